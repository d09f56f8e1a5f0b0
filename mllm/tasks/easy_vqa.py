"""easy-VQA's test questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mllm.easy_vqa import EasyVQA
from mllm.tasks.base import Task, TaskItem
from vision_moe import open_image


class EasyVQATask(Task):
    """The test split, scored overall and by shape, color and yes or no.

    The best answer from the question alone gets 67.0 %.

    Args:
        root: A folder laid out as the package's data; the installed package's by default.
    """

    name = "easy_vqa"

    def __init__(self, root: str | Path | None = None) -> None:
        self._data = EasyVQA("test", root)

    def all_items(self, seed: int) -> Sequence[TaskItem]:
        return [
            TaskItem(str(index), str(q.image_id), q.text, q.answer, q.category)
            for index, q in enumerate(self._data.questions)
        ]

    def open_image(self, image_key: str) -> Image.Image:
        return open_image(self._data.image_path(int(image_key)))
