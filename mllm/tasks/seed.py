"""SEED-Bench (Li et al., arXiv 2307.16125): multiple choice about pictures, nine kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mllm.scoring import seed_correct
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.multiple_choice import MultipleChoiceTask, list_options
from mllm.tasks.records import Record, read_json
from mllm.tasks.rows import HubDataset
from vision_moe import InputError

_LETTERS = "ABCD"
_VIDEO = "video"


class SEEDTask(MultipleChoiceTask):
    """Questions about pictures, overall and by kind; those about videos are left out."""

    name = "seed"
    title = "SEED-Bench"
    needed_files: ClassVar[tuple[str, ...]] = ("SEED-Bench.json", "SEED-Bench-image/")
    hub = HubDataset("lmms-lab-encoder/SEED-Bench", "test")
    image_folders: ClassVar[tuple[str, ...]] = ("", "SEED-Bench-image")

    def read(self) -> Sequence[TaskItem]:
        path = self.file("SEED-Bench.json", "questions and answers")
        content = Record(read_json(path), str(path))
        types = content.get("question_type")
        numbers = types if isinstance(types, dict) else {}
        names = {str(number): name for name, number in numbers.items()}
        return [
            self._item(record, record.text("data_id"), names)
            for record in content.records("questions")
            if record.text("data_type") == "image"
        ]

    def all_items(self, seed: int) -> Sequence[TaskItem]:
        items = super().all_items(seed)
        return [item for item in items if item.category != _VIDEO]

    def read_row(self, record: Record) -> TaskItem:
        item = self._item(record, None, {})
        if record.text("data_type", default="image") == "image":
            return item
        return TaskItem(item.question_id, None, item.question, item.answer, _VIDEO)

    def _item(self, record: Record, image: str | None, names: dict[str, str]) -> TaskItem:
        kind = record.text("question_type_id", default="")
        answer = record.text("answer").strip()
        if answer not in tuple(_LETTERS):
            raise InputError(f"{record.where}: the answer is {answer!r:.60}, not a letter A to D")
        return TaskItem(
            question_id=record.text("question_id"),
            image_key=image,
            question=record.text("question"),
            answer=answer,
            category=names.get(kind, kind),
            options=tuple(record.text(f"choice_{letter.lower()}") for letter in _LETTERS),
        )

    def prompt(self, item: TaskItem) -> str:
        return list_options(item.question, item.options) + self.suffix

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = prediction if prediction in tuple(_LETTERS[: len(item.options)]) else None
        return Score(float(seed_correct(prediction, item.answer)), read)

