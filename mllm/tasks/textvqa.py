"""TextVQA (Singh et al., arXiv 1904.08920): questions whose answers are written in the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mllm.scoring import normalize_textvqa_answer, textvqa_accuracy
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.files import FileTask
from mllm.tasks.records import Record, read_json
from mllm.tasks.rows import HubDataset

_QUESTIONS = "TextVQA_0.5.1_val.json"
_OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"


class TextVQATask(FileTask):
    """The validation questions, with ten answers each.

    Args:
        data: The folder.
        with_ocr: Tell the words that an OCR system found, as LLaVA-1.5's published score does.
    """

    title = "TextVQA"
    needed_files: ClassVar[tuple[str, ...]] = (_QUESTIONS, "train_images/")
    hub = HubDataset("lmms-lab-encoder/textvqa", "validation")
    image_folders: ClassVar[tuple[str, ...]] = ("", "train_images")
    num_human_answers = 10

    def __init__(self, data: str | None = None, with_ocr: bool = False) -> None:
        super().__init__(data)
        self.name = "textvqa_ocr" if with_ocr else "textvqa"
        self._with_ocr = with_ocr

    def read(self) -> Sequence[TaskItem]:
        path = self.file(_QUESTIONS, "questions and human answers")
        tokens = self._ocr_tokens() if self._with_ocr else {}
        return [
            self._item(record, tokens.get(record.text("image_id"), ()))
            for record in Record(read_json(path), str(path)).records("data")
        ]

    def read_row(self, record: Record) -> TaskItem:
        return self._item(record, record.texts("ocr_tokens") if self._with_ocr else ())

    def _ocr_tokens(self) -> dict[str, tuple[str, ...]]:
        path = self.file(_OCR, "the words that an OCR system found")
        return {
            record.text("image_id"): record.texts("ocr_tokens")
            for record in Record(read_json(path), str(path)).records("data")
        }

    def _item(self, record: Record, tokens: tuple[str, ...]) -> TaskItem:
        question = record.text("question").strip()
        if self._with_ocr:
            question += f"\nReference OCR token: {', '.join(tokens)}"
        return TaskItem(
            question_id=record.text("question_id"),
            image_key=f"{record.text('image_id')}.jpg",
            question=question,
            answer="",
            category="",
            answers=record.texts("answers"),
        )

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = normalize_textvqa_answer(prediction)
        return Score(textvqa_accuracy(prediction, item.answers or (item.answer,)), read or None)
