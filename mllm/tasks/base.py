"""What an evaluation task is: questions, their pictures, and the score of the answers."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mllm.scoring import exact_match
from vision_moe import InputError


@dataclass(frozen=True)
class TaskItem:
    """One question with its true answer."""

    question_id: str
    image_key: str
    question: str
    answer: str
    category: str


class Task(ABC):
    """Short answers scored by exact match; another score overrides ``is_correct`` or ``metrics``.

    Attributes:
        name: As in the registry.
        default_num_questions: How many are drawn when nothing else is asked for.
    """

    name: str
    default_num_questions: int = 1000
    max_new_tokens: int = 16

    @abstractmethod
    def all_items(self, seed: int) -> Sequence[TaskItem]:
        """Every question of the task; generated data may depend on the seed."""

    @abstractmethod
    def open_image(self, image_key: str) -> Image.Image:
        """The RGB picture of an item's key."""

    def load(self, num_questions: int | None = None, seed: int = 0) -> list[TaskItem]:
        """Draw questions without replacement, evenly from all of them.

        Args:
            num_questions: How many; ``default_num_questions`` when it is ``None``.
            seed: Of the draw.
        """
        items = self.all_items(seed)
        wanted = min(self.default_num_questions, len(items))
        if num_questions is not None:
            wanted = num_questions
        if not 1 <= wanted <= len(items):
            raise InputError(
                f"task '{self.name}': {wanted} questions wanted, from 1 to {len(items)} possible"
            )
        drawn = random.Random(seed).sample(range(len(items)), wanted)
        return [items[index] for index in drawn]

    def prompt(self, item: TaskItem) -> str:
        """The text that the model is asked."""
        return item.question

    def is_correct(self, item: TaskItem, prediction: str) -> bool:
        return exact_match(prediction, item.answer)

    def metrics(self, items: Sequence[TaskItem], correct: Sequence[bool]) -> dict[str, float]:
        """``accuracy`` over all, and ``accuracy_<category>``, as shares of one."""
        by_category: dict[str, list[bool]] = {}
        for item, hit in zip(items, correct, strict=True):
            by_category.setdefault(item.category, []).append(hit)
        metrics = {"accuracy": sum(correct) / len(correct)}
        for category, hits in sorted(by_category.items()):
            metrics[f"accuracy_{category}"] = sum(hits) / len(hits)
        return metrics
