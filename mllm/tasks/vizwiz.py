"""VizWiz (Gurari et al., arXiv 1802.08218): questions that blind people asked of their photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mllm.scoring import normalize_vqa_answer, vqa_accuracy
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.files import SHORT_ANSWER, FileTask
from mllm.tasks.records import Record, read_records
from mllm.tasks.rows import HubDataset


class VizWizTask(FileTask):
    """The validation questions with their ten answers, or LLaVA's test questions for the server."""

    name = "vizwiz"
    title = "VizWiz"
    needed_files: ClassVar[tuple[str, ...]] = ("val.json", "val/")
    llava_file = "llava_test.jsonl"
    suffix = (
        "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        + SHORT_ANSWER
    )
    hub = HubDataset("lmms-lab-encoder/VizWiz-VQA", "val")
    image_folders: ClassVar[tuple[str, ...]] = ("", "val", "test")
    num_human_answers = 10

    def read(self) -> Sequence[TaskItem]:
        path = self.file("val.json", "questions and human answers")
        return [self._item(record, record.text("image")) for record in read_records(path)]

    def read_row(self, record: Record) -> TaskItem:
        return self._item(record, None)

    def _item(self, record: Record, image: str | None) -> TaskItem:
        return TaskItem(
            # The benchmark asks one question a picture, and names it by that.
            question_id=image or record.text("question_id"),
            image_key=image,
            question=record.text("question"),
            answer="",
            category=record.text("answer_type", "category", default=""),
            answers=record.texts("answers"),
        )

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = normalize_vqa_answer(prediction)
        return Score(vqa_accuracy(prediction, item.answers or (item.answer,)), read or None)

    def submission(self, answers: Sequence[tuple[TaskItem, str]]) -> list[dict[str, Any]]:
        return [
            {"image": item.image_key or "", "answer": normalize_vqa_answer(text)}
            for item, text in answers
        ]
