"""Questions about rendered scenes, by category."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from mllm.scenes import ScenesDataset, SceneWorld
from mllm.tasks.base import Task, TaskItem


class ScenesTask(Task):
    """Questions about scenes that no training split shows.

    Args:
        split: ``test``, or ``compositional`` for shape-color pairs that training never shows.
        num_scenes: Scenes whose questions are drawn from.
        world: The factors; the standard world by default.
    """

    default_num_questions = 1000
    max_new_tokens = 16

    def __init__(
        self, split: str = "test", num_scenes: int = 500, world: SceneWorld | None = None
    ) -> None:
        super().__init__()
        self.name = "scenes" if split == "test" else f"scenes_{split}"
        self._split = split
        self._num_scenes = num_scenes
        self._world = world or SceneWorld()

    def all_items(self, seed: int) -> Sequence[TaskItem]:
        scenes = self._scenes(seed)
        return [
            TaskItem(f"{seed}-{index}-{number}", f"{seed}-{index}", q.text, q.answer, q.category)
            for index in range(len(scenes))
            for number, q in enumerate(scenes[index].questions)
        ]

    def open_image(self, image_key: str) -> Image.Image:
        seed, index = map(int, image_key.split("-"))
        return self._scenes(seed)[index].image

    def _scenes(self, seed: int) -> ScenesDataset:
        return ScenesDataset(self._world, self._split, self._num_scenes, seed)
