"""What an evaluation task is: questions, their pictures, and the score of the answers.

Load questions -> prompt -> generate -> score. Scoring needs the items alone, never the data they
came from, so that saved predictions can be scored again anywhere.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from mllm.scoring import Interval, bootstrap_interval, exact_match, normalize_answer
from vision_moe import InputError


@dataclass(frozen=True)
class TaskItem:
    """One question with its true answer.

    Attributes:
        question_id: Of its own within the task.
        image_key: What :meth:`Task.open_image` takes; ``None`` for a question without a picture.
        question: Text, without what :meth:`Task.prompt` adds.
        answer: The truth, or what most humans said; empty where it is not known.
        category: Scores are told by it.
        answers: All human answers or captions, where there are several.
        options: Texts of a multiple choice, from A.
    """

    question_id: str
    image_key: str | None
    question: str
    answer: str
    category: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def is_labelled(self) -> bool:
        return bool(self.answer or self.answers)


class Score(NamedTuple):
    """Of one answer.

    Attributes:
        value: From 0 to 1 (captions: CIDEr-D, from 0 to 10).
        read: What the rules took the text for; ``None`` where they could make nothing of it.
    """

    value: float
    read: str | None


class Task(ABC):
    """Short answers scored by exact match; other scores override ``score`` or ``means``.

    Attributes:
        name: As in the registry.
        default_num_questions: How many are drawn when nothing else is asked for; ``None`` for all.
        max_new_tokens: Longest answer.
        num_human_answers: How many a question should have, where scoring counts on them.
        percent: Metrics are shares of one; else they are points.
        graded: Scores lie between right and wrong, so that ``correct`` says nothing.
    """

    name: str
    default_num_questions: ClassVar[int | None] = None
    max_new_tokens: ClassVar[int] = 128
    num_human_answers: ClassVar[int] = 0
    percent: ClassVar[bool] = True
    graded: ClassVar[bool] = False

    def __init__(self, data: str | None = None) -> None:
        """Only remember where the data lies: scoring needs none."""
        self.data = data
        self.duplicate_ids: list[str] = []

    def find_data(self) -> None:  # noqa: B027 - data that is made needs no finding
        """Look for the data.

        Raises:
            InputError: It is not there; the sentence says what belongs where.
        """

    @abstractmethod
    def all_items(self, seed: int) -> Sequence[TaskItem]:
        """Every question of the task; generated data may depend on the seed."""

    @abstractmethod
    def open_image(self, image_key: str) -> Image.Image:
        """The RGB picture of an item's key."""

    def load(self, num_questions: int | None = None, seed: int = 0) -> list[TaskItem]:
        """Draw questions without replacement, evenly from all of them.

        Questions that are scored together (:meth:`group`) are drawn together, so that a draw may
        hold a few more than were wanted. Of questions with one id the first stays, and
        ``duplicate_ids`` tells of the others.

        Args:
            num_questions: How many; ``default_num_questions`` when it is ``None``.
            seed: Of the draw.
        """
        by_id: dict[str, TaskItem] = {}
        self.duplicate_ids = []
        for item in self.all_items(seed):
            if item.question_id in by_id:
                self.duplicate_ids.append(item.question_id)
            by_id.setdefault(item.question_id, item)
        items = list(by_id.values())
        if not items:
            raise InputError(f"task '{self.name}': its data hold no question")
        wanted = len(items)
        if num_questions is not None:
            wanted = num_questions
        elif self.default_num_questions is not None:
            wanted = min(self.default_num_questions, len(items))
        if not 1 <= wanted <= len(items):
            raise InputError(
                f"task '{self.name}': {wanted} questions wanted, from 1 to {len(items)} possible"
            )
        if num_questions is None and self.default_num_questions is None:
            return items
        groups: dict[str, list[TaskItem]] = {}
        for item in items:
            groups.setdefault(self.group(item), []).append(item)
        names = list(groups)
        drawn: list[TaskItem] = []
        for index in random.Random(seed).sample(range(len(names)), min(wanted, len(names))):
            if len(drawn) >= wanted:
                break
            drawn += groups[names[index]]
        return drawn

    def group(self, item: TaskItem) -> str:
        """Questions of one group are scored together."""
        return item.question_id

    def prompt(self, item: TaskItem) -> str:
        """The text that the model is asked."""
        return item.question

    def choices(self, item: TaskItem) -> tuple[str, ...]:
        """The answers to choose from by likelihood; empty where the question is open."""
        return ()

    def score(self, item: TaskItem, prediction: str) -> Score:
        """Of one answer to a labelled question."""
        right = exact_match(prediction, item.answer)
        return Score(float(right), normalize_answer(prediction) or None)

    def scores(self, items: Sequence[TaskItem], predictions: Sequence[str]) -> list[Score]:
        """Of all answers; another task's may depend on one another."""
        return [self.score(item, text) for item, text in zip(items, predictions, strict=True)]

    def means(
        self, items: Sequence[TaskItem], values: Sequence[float]
    ) -> dict[str, Sequence[float]]:
        """The numbers whose mean is a metric: ``accuracy`` and ``accuracy_<category>``."""
        by_category: dict[str, list[float]] = {}
        for item, value in zip(items, values, strict=True):
            if item.category:
                by_category.setdefault(item.category, []).append(value)
        named = {f"accuracy_{category}": by_category[category] for category in sorted(by_category)}
        return {"accuracy": list(values), **named}

    def metrics(self, items: Sequence[TaskItem], values: Sequence[float]) -> dict[str, float]:
        """Scores of the task from those of its questions, in the order to show them in."""
        means = self.means(items, values)
        return {name: sum(numbers) / len(numbers) for name, numbers in means.items()}

    def intervals(
        self, items: Sequence[TaskItem], values: Sequence[float], seed: int
    ) -> Mapping[str, Interval]:
        """95 % bootstrap intervals of :meth:`metrics`."""
        means = self.means(items, values)
        return {name: bootstrap_interval(numbers, seed) for name, numbers in means.items()}

    def submission(self, answers: Sequence[tuple[TaskItem, str]]) -> list[dict[str, Any]]:
        """Rows of the file that the benchmark's test server takes.

        Raises:
            InputError: The benchmark has none.
        """
        raise InputError(f"task '{self.name}' has no test server to submit answers to")
