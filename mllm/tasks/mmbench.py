"""MMBench (Liu et al., arXiv 2307.06281): multiple choice, asked once for each rotation."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import string
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from PIL import Image

from mllm.scoring import mmbench_circular, mmbench_option
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.multiple_choice import MultipleChoiceTask, list_options
from mllm.tasks.records import Record, read_records
from mllm.tasks.rows import HubDataset
from vision_moe import InputError, open_image

_FILES = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev_en_20231003.tsv",
          "mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv")  # fmt: skip
_ROTATION = 1_000_000


class MMBenchTask(MultipleChoiceTask):
    """Scored overall and by category; a circular question is right in every rotation or wrong.

    Args:
        data: The folder.
        circular: Ask every rotation of the options; else each question once.
    """

    title = "MMBench"
    needed_files: ClassVar[tuple[str, ...]] = ("mmbench_dev_20230712.tsv",)
    hub = HubDataset("lmms-lab-encoder/MMBench", "dev", "en")

    def __init__(self, data: str | None = None, circular: bool = True) -> None:
        super().__init__(data)
        self.name = "mmbench" if circular else "mmbench_single"
        self._circular = circular
        self._pictures: dict[str, str] = {}

    def find_data(self) -> None:
        if self.data is None or not any(map(self.optional_file, _FILES)):
            super().find_data()

    def all_items(self, seed: int) -> Sequence[TaskItem]:
        if self._rows is not None:
            return [turn for item in self._row_items(self._rows) for turn in self._turns(item)]
        return [turn for item in self.read() for turn in self._turns(item)]

    def read(self) -> Sequence[TaskItem]:
        items = []
        for record in self._records():
            items.append(dataclasses.replace(self.read_row(record), image_key=record.text("index")))
        return items

    def read_row(self, record: Record) -> TaskItem:
        letters = string.ascii_uppercase
        options = [record.text(letter) for letter in letters if record.get(letter) is not None]
        if len(options) < 2:
            raise InputError(f"{record.where}: fewer than two options")
        answer = record.text("answer", default="")
        if answer and answer not in string.ascii_uppercase[: len(options)]:
            raise InputError(f"{record.where}: the answer '{answer}' is none of the options")
        hint = record.text("hint", default="")
        return TaskItem(
            question_id=str(record.number("index")),
            image_key=None,
            question=f"{hint}\n{record.text('question')}" if hint else record.text("question"),
            answer=answer,
            category=record.text("category", default=""),
            options=tuple(options),
        )

    def _turns(self, item: TaskItem) -> Iterator[TaskItem]:
        """The question itself, or with each rotation of its options.

        A file that holds rotations already gives them as they are.
        """
        index, num_options = int(item.question_id), len(item.options)
        if index >= _ROTATION:
            if self._circular:
                yield item
            return
        yield item
        if not self._circular or self._holds_rotations:
            return
        for turn in range(1, num_options):
            answer = item.answer
            if answer:
                place = (string.ascii_uppercase.index(answer) - turn) % num_options
                answer = string.ascii_uppercase[place]
            yield dataclasses.replace(
                item,
                question_id=str(turn * _ROTATION + index),
                answer=answer,
                options=item.options[turn:] + item.options[:turn],
            )

    @property
    def _holds_rotations(self) -> bool:
        return any(int(key) >= _ROTATION for key in self._pictures)

    def _records(self) -> list[Record]:
        path = next(filter(None, map(self.optional_file, _FILES)))
        records = read_records(path)
        self._pictures = {record.text("index"): record.text("image") for record in records}
        return records

    def group(self, item: TaskItem) -> str:
        return str(int(item.question_id) % _ROTATION)

    def prompt(self, item: TaskItem) -> str:
        return list_options(item.question, item.options) + self.suffix

    def open_image(self, image_key: str) -> Image.Image:
        if self.data is None or not any(map(self.optional_file, _FILES)):
            return super().open_image(image_key)
        if not self._pictures:
            self._records()
        content = self._pictures[image_key]
        content = self._pictures.get(content, content)  # a rotation names its question's picture
        try:
            return open_image(io.BytesIO(base64.b64decode(content, validate=True)))
        except binascii.Error as error:
            raise InputError(f"index {image_key}: the picture is not base64 ({error})") from error

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = mmbench_option(prediction, item.options)
        return Score(float(read == item.answer), read)

    def means(
        self, items: Sequence[TaskItem], values: Sequence[float]
    ) -> dict[str, Sequence[float]]:
        if not self._circular:
            return super().means(items, values)
        indices = [int(item.question_id) for item in items]
        hits = mmbench_circular(indices, [value == 1 for value in values])
        questions = {int(self.group(item)): item for item in items}
        named = super().means([questions[index] for index in hits], list(map(float, hits.values())))
        # Each question counts once in "accuracy"; single turns are told beside.
        first = [value for index, value in zip(indices, values, strict=True) if index < _ROTATION]
        return named | ({"accuracy_first_turn": first} if first else {})

    def submission(self, answers: Sequence[tuple[TaskItem, str]]) -> list[dict[str, Any]]:
        """The server rotates by itself: turns of our making are left out."""
        rows = []
        for item, text in answers:
            if int(item.question_id) >= _ROTATION and not self._holds_rotations:
                continue
            options = dict(zip(string.ascii_uppercase, item.options, strict=False))
            rows.append(
                {
                    "index": int(item.question_id),
                    "question": item.question.partition("\nA. ")[0],
                    **{letter: options.get(letter, "") for letter in "ABCD"},
                    "prediction": text,
                }
            )
        return rows
