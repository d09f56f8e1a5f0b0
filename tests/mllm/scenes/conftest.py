"""Scenes of every split, drawn once."""


import pytest

from mllm.scenes import (
    SPLITS,
    Scene,
    ScenesDataset,
    SceneWorld,
)
from mllm.scenes.world import BACKGROUNDS, COLORS, LETTERS, SHAPES

NUM_SCENES = 300
#: Every value there is.
WIDE = SceneWorld(shapes=SHAPES, colors=COLORS, backgrounds=BACKGROUNDS, letters=LETTERS)


def scenes_of(split: str, world: SceneWorld) -> list[Scene]:
    dataset = ScenesDataset(world, split, NUM_SCENES)
    return [dataset[i].scene for i in range(NUM_SCENES)]


@pytest.fixture(scope="session")
def drawn() -> dict[str, list[Scene]]:
    """300 scenes of the default world for each split."""
    return {split: scenes_of(split, SceneWorld()) for split in SPLITS}


@pytest.fixture(scope="session")
def wide() -> list[Scene]:
    """300 scenes of a world with every value there is."""
    return scenes_of("train", WIDE)
