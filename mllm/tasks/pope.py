"""POPE (Li et al., arXiv 2305.10355): is an object in the picture, yes or no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from mllm.scoring import Interval, pope_answer, pope_intervals, pope_metrics, pope_scores
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.files import FileTask
from mllm.tasks.records import Record, read_records
from mllm.tasks.rows import HubDataset
from vision_moe import InputError

CATEGORIES = ("random", "popular", "adversarial")


class POPETask(FileTask):
    """``yes`` is the positive class; random, popular and adversarial questions, paired by id."""

    name = "pope"
    title = "POPE"
    needed_files: ClassVar[tuple[str, ...]] = (
        *(f"coco_pope_{category}.json" for category in CATEGORIES),
        "val2014/",
    )
    hub = HubDataset("lmms-lab-encoder/POPE", "test")
    image_folders: ClassVar[tuple[str, ...]] = ("", "val2014")

    def read(self) -> Sequence[TaskItem]:
        return [
            self._item(record, record.text("image"), category)
            for category in CATEGORIES
            for record in read_records(
                self.file(f"coco_pope_{category}.json", f"the {category} questions")
            )
        ]

    def read_row(self, record: Record) -> TaskItem:
        category = record.text("category")
        return self._item(record, record.text("image_source", default="") or None, category)

    def _item(self, record: Record, image: str | None, category: str) -> TaskItem:
        label = record.text("label", "answer", default="").strip().lower()
        if label not in ("yes", "no", ""):
            raise InputError(f"{record.where}: the label is {label!r:.60}, neither 'yes' nor 'no'")
        return TaskItem(
            # The three files count from one each.
            question_id=f"{category}-{record.text('question_id')}",
            image_key=image,
            question=record.text("text", "question"),
            answer=label,
            category=category,
        )

    def choices(self, item: TaskItem) -> tuple[str, ...]:
        return ("Yes", "No")

    def score(self, item: TaskItem, prediction: str) -> Score:
        answer = pope_answer(prediction)
        # The rule takes anything for a yes; what says neither is counted beside the score.
        says = answer == "no" or "yes" in prediction.lower()
        return Score(float(answer == item.answer), answer if says else None)

    def metrics(self, items: Sequence[TaskItem], values: Sequence[float]) -> dict[str, float]:
        answers, labels, categories = _answers(items, values)
        overall = pope_metrics(answers, labels)
        return overall | pope_scores(answers, labels, categories)

    def intervals(
        self, items: Sequence[TaskItem], values: Sequence[float], seed: int
    ) -> Mapping[str, Interval]:
        return pope_intervals(*_answers(items, values), seed)


def _answers(
    items: Sequence[TaskItem], values: Sequence[float]
) -> tuple[list[str], list[str], list[str]]:
    """What was answered, the truth, and the categories."""
    other = {"yes": "no", "no": "yes"}
    answers = [
        item.answer if value == 1 else other[item.answer]
        for item, value in zip(items, values, strict=True)
    ]
    return answers, [item.answer for item in items], [item.category for item in items]
