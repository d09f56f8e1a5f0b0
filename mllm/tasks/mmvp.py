"""MMVP (Tong et al., arXiv 2401.06209): pairs of pictures that CLIP takes for the same."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import ClassVar

from mllm.scoring import mmbench_option
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.multiple_choice import MultipleChoiceTask, list_options
from mllm.tasks.records import Record, read_records
from mllm.tasks.rows import HubDataset
from vision_moe import InputError

_OPTION = re.compile(r"\(([a-z])\)\s*([^(]+)")


class MMVPTask(MultipleChoiceTask):
    """Two questions a pair; the pair is right when both are, and that is the score."""

    name = "mmvp"
    title = "MMVP"
    needed_files: ClassVar[tuple[str, ...]] = ("Questions.csv", "MMVP Images/")
    hub = HubDataset("lmms-lab-eval/MMVP", "train")
    image_folders: ClassVar[tuple[str, ...]] = ("", "MMVP Images")

    def read(self) -> Sequence[TaskItem]:
        path = self.file("Questions.csv", "questions and answers")
        return [self._item(record, f"{_index(record)}.jpg") for record in read_records(path)]

    def read_row(self, record: Record) -> TaskItem:
        return self._item(record, None)

    def _item(self, record: Record, image: str | None) -> TaskItem:
        options = _OPTION.findall(record.text("Options", "options"))
        letters = [letter for letter, _ in options]
        right = record.text("Correct Answer", "answer").strip().strip("()").lower()
        if right not in letters or letters != list(string.ascii_lowercase[: len(letters)]):
            raise InputError(f"{record.where}: the answer '{right}' is none of the options")
        return TaskItem(
            question_id=_index(record),
            image_key=image,
            question=record.text("Question", "question").strip(),
            answer=right.upper(),
            category="",
            options=tuple(text.strip() for _, text in options),
        )

    def group(self, item: TaskItem) -> str:
        return str((int(item.question_id) - 1) // 2)

    def prompt(self, item: TaskItem) -> str:
        return list_options(item.question, item.options) + self.suffix

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = mmbench_option(prediction, item.options)
        return Score(float(read == item.answer), read)

    def means(
        self, items: Sequence[TaskItem], values: Sequence[float]
    ) -> dict[str, Sequence[float]]:
        pairs: dict[str, list[float]] = {}
        for item, value in zip(items, values, strict=True):
            pairs.setdefault(self.group(item), []).append(value)
        return {
            "pair_accuracy": [min(pair) for pair in pairs.values()],
            **super().means(items, values),
        }


def _index(record: Record) -> str:
    for key in ("Index", "index", "lndex"):  # the file itself spells it with an l
        if record.get(key) is not None:
            return str(record.number(key))
    raise InputError(f"{record.where}: the field 'Index' is missing")
