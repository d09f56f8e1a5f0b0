"""GQA (Hudson and Manning, arXiv 1902.09506): compositional questions, the balanced test-dev."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mllm.scoring import gqa_correct
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.files import FileTask
from mllm.tasks.records import Record, read_json
from vision_moe import InputError

_QUESTIONS = "testdev_balanced_questions.json"


class GQATask(FileTask):
    """Scored overall and by structural type."""

    name = "gqa"
    title = "GQA"
    needed_files: ClassVar[tuple[str, ...]] = (_QUESTIONS, "images/")
    llava_file = "llava_gqa_testdev_balanced.jsonl"

    def read(self) -> Sequence[TaskItem]:
        path = self.file(_QUESTIONS, "the questions with their answers")
        questions = read_json(path)
        if not isinstance(questions, dict):
            raise InputError(f"{path}: not an object with a question for each id")
        return [
            self._item(question_id, Record(values, f"{path}, question '{question_id}'"))
            for question_id, values in questions.items()
        ]

    def _item(self, question_id: str, record: Record) -> TaskItem:
        types = record.get("types")
        category = types.get("structural") if isinstance(types, dict) else None
        return TaskItem(
            question_id=question_id,
            image_key=f"{record.text('imageId')}.jpg",
            question=record.text("question"),
            answer=record.text("answer", default=""),
            category=category if isinstance(category, str) else "",
        )

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = prediction.rstrip(".").lower()
        return Score(float(gqa_correct(prediction, item.answer)), read or None)
