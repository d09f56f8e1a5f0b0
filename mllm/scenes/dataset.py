"""Scenes as a data set: sample ``i`` of a split depends on the seed, the split and ``i`` alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from mllm.scenes.render import render
from mllm.scenes.text import Question, coarse_caption, detailed_caption, questions
from mllm.scenes.world import Scene, SceneWorld

SPLITS = ("train", "validation", "test", "compositional")


@dataclass(frozen=True)
class SceneSample:
    """A scene with all that is said of it; the picture is rendered when it is asked for."""

    scene: Scene
    image_size: int
    coarse_caption: str
    detailed_caption: str
    questions: list[Question]

    @cached_property
    def image(self) -> Image.Image:
        return render(self.scene, self.image_size)


class ScenesDataset:
    """``length`` scenes of one split.

    Args:
        world: The factors.
        split: One of :data:`SPLITS`; ``compositional`` shows the held-out shape-color pairs.
        length: Number of scenes.
        seed: Seed of the whole data set, shared by its splits.
        image_size: Side of the pictures, pixels.
        detail_probability: How often a coarse caption tells each fact beyond the main object.
    """

    def __init__(
        self,
        world: SceneWorld,
        split: str,
        length: int,
        seed: int = 0,
        image_size: int = 64,
        detail_probability: float = 0.1,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"scenes: unknown split {split!r}; one of {list(SPLITS)}")
        if split == "compositional" and not world.held_out_pairs:
            raise ValueError(
                "scenes: no shape-color pair is held out; raise held_out_share or add values"
            )
        self.world = world
        self.split = split
        self.length = length
        self.seed = seed
        self.image_size = image_size
        self.detail_probability = detail_probability

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> SceneSample:
        if not 0 <= index < self.length:
            raise IndexError(f"scenes: sample {index} of {self.length}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        scene = self.world.sample(rng, held_out=self.split == "compositional")
        return SceneSample(
            scene=scene,
            image_size=self.image_size,
            coarse_caption=coarse_caption(scene, rng, self.detail_probability),
            detailed_caption=detailed_caption(scene),
            questions=questions(scene, self.world, rng),
        )
