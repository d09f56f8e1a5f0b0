"""Your own questions: a JSONL file of picture, question and answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mllm.scoring import exact_match, normalize_answer
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.multiple_choice import OPTION_LETTER, MultipleChoiceTask, list_options
from mllm.tasks.records import Record, read_records
from vision_moe import InputError

_FILE = "questions.jsonl"


class CustomTask(MultipleChoiceTask):
    """Exact match with any of the answers.

    Fields of a record: ``question``, ``answers`` (or ``answer``), ``image`` (may be absent), and
    what is wanted of ``question_id`` (else the line's number), ``category`` and ``options``, of
    which the answer is one, by letter or by text.

    Args:
        data: The file, or a folder that holds ``questions.jsonl``; pictures lie below.
    """

    name = "custom"
    title = "The custom task"
    needed_files: ClassVar[tuple[str, ...]] = (_FILE,)
    suffix = ""

    def __init__(self, data: str | None = None) -> None:
        super().__init__(data)
        self._name = _FILE
        if data is not None and Path(data).is_file():
            self.data, self._name = str(Path(data).parent), Path(data).name

    def find_data(self) -> None:
        if self._name == _FILE:
            super().find_data()

    def all_items(self, seed: int) -> Sequence[TaskItem]:
        return self.read()

    def read(self) -> Sequence[TaskItem]:
        records = read_records(self.file(self._name, "your questions"))
        return [self._item(record, number) for number, record in enumerate(records)]

    def _item(self, record: Record, number: int) -> TaskItem:
        answers = record.texts("answers", "answer")
        options = record.texts("options")
        answer = answers[0] if answers else ""
        if options and answer:
            letters = self.choices(TaskItem("", None, "", "", "", options=options))
            if answer not in letters and answer not in options:
                raise InputError(f"{record.where}: answer {answer!r:.60} is none of the options")
            answer = answer if answer in letters else letters[options.index(answer)]
            answers = ()
        return TaskItem(
            question_id=record.text("question_id", default=str(number)),
            image_key=record.text("image", default="") or None,
            question=record.text("question", "text"),
            answer=answer,
            category=record.text("category", default=""),
            answers=answers if len(answers) > 1 else (),
            options=options,
        )

    def prompt(self, item: TaskItem) -> str:
        if not item.options:
            return item.question
        return list_options(item.question, item.options) + OPTION_LETTER

    def score(self, item: TaskItem, prediction: str) -> Score:
        right = any(exact_match(prediction, one) for one in item.answers or (item.answer,))
        return Score(float(right), normalize_answer(prediction) or None)
