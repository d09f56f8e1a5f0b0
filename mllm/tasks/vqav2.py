"""VQAv2 (Goyal et al., arXiv 1612.00837): open questions about COCO pictures, ten humans each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mllm.scoring import normalize_vqa_answer, vqa_accuracy
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.files import FileTask
from mllm.tasks.records import Record, read_json, read_records
from mllm.tasks.rows import HubDataset

_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_ALL_TEST_QUESTIONS = "llava_vqav2_mscoco_test2015.jsonl"
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


class VQAv2Task(FileTask):
    """The validation questions with their ten answers, or LLaVA's test questions for the server."""

    name = "vqav2"
    title = "VQAv2"
    needed_files: ClassVar[tuple[str, ...]] = (_QUESTIONS, _ANNOTATIONS, "val2014/")
    llava_file = "llava_vqav2_mscoco_test-dev2015.jsonl"
    hub = HubDataset("lmms-lab-encoder/VQAv2", "validation")
    image_folders: ClassVar[tuple[str, ...]] = ("", "val2014", "test2015")
    num_human_answers = 10

    def read(self) -> Sequence[TaskItem]:
        path = self.file(_ANNOTATIONS, "the human answers")
        annotations = {
            record.text("question_id"): record
            for record in Record(read_json(path), str(path)).records("annotations")
        }
        path = self.file(_QUESTIONS, "the questions")
        return [
            self._item(record, annotations.get(record.text("question_id")))
            for record in Record(read_json(path), str(path)).records("questions")
        ]

    def read_row(self, record: Record) -> TaskItem:
        return self._item(record, record)

    def _item(self, question: Record, annotation: Record | None) -> TaskItem:
        image_id = question.text("image_id", default="")
        return TaskItem(
            question_id=question.text("question_id"),
            image_key=f"COCO_val2014_{image_id.zfill(12)}.jpg" if image_id else None,
            question=question.text("question"),
            answer=annotation.text("multiple_choice_answer", default="") if annotation else "",
            category=annotation.text("answer_type", default="") if annotation else "",
            answers=annotation.texts("answers") if annotation else (),
        )

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = normalize_vqa_answer(prediction)
        return Score(vqa_accuracy(prediction, item.answers or (item.answer,)), read or None)

    def submission(self, answers: Sequence[tuple[TaskItem, str]]) -> list[dict[str, Any]]:
        """The server wants all of the test questions; those that were not asked get no answer."""
        path = None if self.data is None else self.optional_file(_ALL_TEST_QUESTIONS)
        every = [] if path is None else read_records(path)
        texts = {record.text("question_id"): "" for record in every}
        texts |= {item.question_id: normalize_vqa_answer(text) for item, text in answers}
        return [
            {"question_id": int(question_id), "answer": text} for question_id, text in texts.items()
        ]
