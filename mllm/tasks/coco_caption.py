"""COCO captions (Chen et al., arXiv 1504.00325), scored by CIDEr-D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mllm.scoring import cider
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.files import FileTask
from mllm.tasks.records import Record, read_json
from mllm.tasks.rows import HubDataset

_FILES = ("captions_val2014.json", "captions_val2017.json")


class COCOCaptionTask(FileTask):
    """One caption a picture against the human ones.

    The interval resamples pictures; the weights of the words stay those of the whole set.
    """

    name = "coco_caption"
    title = "COCO captions"
    needed_files: ClassVar[tuple[str, ...]] = (_FILES[0], "val2014/")
    suffix = ""
    hub = HubDataset("lmms-lab-encoder/COCO-Caption", "val")
    image_folders: ClassVar[tuple[str, ...]] = ("", "val2014", "val2017")
    percent = False
    graded = True
    _question = "Provide a one-sentence caption for the provided image."

    def find_data(self) -> None:
        if self.data is None or self.optional_file(_FILES[1]) is None:
            super().find_data()

    def read(self) -> Sequence[TaskItem]:
        path = self.optional_file(_FILES[1]) or self.file(_FILES[0], "the human captions")
        content = Record(read_json(path), str(path))
        captions: dict[str, list[str]] = {}
        for record in content.records("annotations"):
            captions.setdefault(record.text("image_id"), []).append(record.text("caption"))
        return [
            self._item(record.text("id"), record.text("file_name"), captions)
            for record in content.records("images")
        ]

    def _item(self, image_id: str, name: str, captions: dict[str, list[str]]) -> TaskItem:
        return TaskItem(
            image_id, name, self._question, "", "", answers=tuple(captions.get(image_id, ()))
        )

    def read_row(self, record: Record) -> TaskItem:
        name = record.text("question_id", "id")
        return TaskItem(name, None, self._question, "", "", answers=record.texts("answer"))

    def scores(self, items: Sequence[TaskItem], predictions: Sequence[str]) -> list[Score]:
        per_item = cider(predictions, [item.answers for item in items]).per_item
        texts = zip(per_item, predictions, strict=True)
        return [Score(value, text or None) for value, text in texts]

    def means(
        self, items: Sequence[TaskItem], values: Sequence[float]
    ) -> dict[str, Sequence[float]]:
        return {"cider": list(values)}
