"""easy-VQA's test questions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from PIL import Image

from mllm.easy_vqa import EasyVQA
from mllm.tasks.base import Task, TaskItem
from vision_moe import open_image

ANSWERS = {
    "yes-no": ("yes", "no"),
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}


class EasyVQATask(Task):
    """The test split, scored overall and by shape, color and yes or no.

    The best answer from the question alone gets 67.0 %.

    Args:
        data: A folder laid out as the package's data; the installed package's by default.
    """

    name = "easy_vqa"
    default_num_questions = 1000
    max_new_tokens = 16

    def find_data(self) -> None:
        assert self._split.questions

    @cached_property
    def _split(self) -> EasyVQA:
        return EasyVQA("test", self.data)

    def all_items(self, seed: int) -> Sequence[TaskItem]:
        return [
            TaskItem(str(index), str(q.image_id), q.text, q.answer, q.category)
            for index, q in enumerate(self._split.questions)
        ]

    def choices(self, item: TaskItem) -> tuple[str, ...]:
        return ANSWERS[item.category]

    def open_image(self, image_key: str) -> Image.Image:
        return open_image(self._split.image_path(int(image_key)))
