"""ScienceQA (Lu et al., arXiv 2209.09513): school questions, about half of them with a picture."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import ClassVar

from mllm.scoring import scienceqa_option
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.multiple_choice import MultipleChoiceTask, list_options
from mllm.tasks.records import Record, read_json
from mllm.tasks.rows import HubDataset
from vision_moe import InputError


class ScienceQATask(MultipleChoiceTask):
    """The test split: all questions, those with a picture, and by subject."""

    name = "scienceqa"
    title = "ScienceQA"
    needed_files: ClassVar[tuple[str, ...]] = ("problems.json", "pid_splits.json", "test/")
    hub = HubDataset("lmms-lab-encoder/ScienceQA", "test", "ScienceQA-FULL")
    image_folders: ClassVar[tuple[str, ...]] = ("", "test", "images/test", "images")
    may_lack_pictures = True

    def read(self) -> Sequence[TaskItem]:
        path = self.file("problems.json", "questions and answers")
        problems = Record(read_json(path), str(path))
        splits_path = self.file("pid_splits.json", "which questions are the test's")
        ids = Record(read_json(splits_path), str(splits_path)).texts("test")
        items = []
        for question_id in ids:
            record = Record(problems.get(question_id), f"{path}, problem '{question_id}'")
            image = record.text("image", default="")
            items.append(
                self._item(record, question_id, f"{question_id}/{image}" if image else None)
            )
        return items

    def read_row(self, record: Record) -> TaskItem:
        return self._item(record, record.where.rpartition(" ")[2], None)

    def _item(self, record: Record, question_id: str, image: str | None) -> TaskItem:
        choices = record.texts("choices")
        answer = record.number("answer")
        if not 0 <= answer < len(choices) <= len(string.ascii_uppercase):
            raise InputError(f"{record.where}: answer {answer} of {len(choices)} choices")
        hint = record.text("hint", default="").strip()
        question = record.text("question")
        return TaskItem(
            question_id=question_id,
            image_key=image,
            question=f"Context: {hint}\n{question}" if hint else question,
            answer=string.ascii_uppercase[answer],
            category=record.text("subject", default=""),
            options=choices,
        )

    def prompt(self, item: TaskItem) -> str:
        return list_options(item.question, item.options) + self.suffix

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = scienceqa_option(prediction, len(item.options))
        return Score(float(read == item.answer), read)

    def means(
        self, items: Sequence[TaskItem], values: Sequence[float]
    ) -> dict[str, Sequence[float]]:
        means = super().means(items, values)
        with_image = [
            value for item, value in zip(items, values, strict=True) if item.image_key is not None
        ]
        shown = {"accuracy_image": with_image} if with_image else {}
        return {"accuracy": means.pop("accuracy"), **shown, **means}
