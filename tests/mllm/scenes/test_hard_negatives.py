"""A hard negative changes one factor and nothing else."""

import math
from dataclasses import fields

import numpy as np
import pytest

from mllm.scenes import (
    FACTORS,
    Scene,
    SceneObject,
    SceneWorld,
    detailed_caption,
    render,
)
from mllm.scenes.world import BACKGROUNDS, COLORS, LETTERS, PLACES, SHAPES

WORLD = SceneWorld()
#: Every value there is.
WIDE = SceneWorld(shapes=SHAPES, colors=COLORS, backgrounds=BACKGROUNDS, letters=LETTERS)


def kinds(scene: Scene) -> set[tuple[str, str]]:
    return {(obj.shape, obj.color) for obj in scene.objects}


def assert_inside(obj: SceneObject) -> None:
    radius = obj.diameter / 2
    assert radius - 1e-9 <= min(obj.x, obj.y) and max(obj.x, obj.y) <= 1 - radius + 1e-9, obj


def hard_negatives(
    scenes: list[Scene], factor: str, world: SceneWorld
) -> list[tuple[Scene, Scene]]:
    changed = [
        (scene, world.hard_negative(scene, factor, np.random.default_rng(i)))
        for i, scene in enumerate(scenes)
    ]
    pairs = [(scene, other) for scene, other in changed if other is not None]
    assert len(pairs) > 10, f"{factor}: too few to tell anything"
    return pairs


def difference(scene: Scene, other: Scene) -> set[str]:
    """Names of the factors in which two scenes differ, geometry left aside."""
    names = {
        name
        for name in ("shape", "color", "size", "texture", "place")
        if getattr(scene.main, name) != getattr(other.main, name)
    }
    if scene.background != other.background:
        names.add("background")
    if scene.letter != other.letter:
        names.add("letter")
    if len(scene.companions) != len(other.companions):
        names.add("count")
    for one, two in zip(scene.companions, other.companions, strict=False):
        names |= {
            f"companion {name}"
            for name in ("shape", "color", "size", "texture", "place")
            if getattr(one, name) != getattr(two, name)
        }
    assert scene.nuisance == other.nuisance and scene.letter_place == other.letter_place
    return names


@pytest.mark.parametrize("factor", FACTORS)
def test_hard_negative_changes_its_factor_alone(wide: list[Scene], factor: str) -> None:
    for scene, other in hard_negatives(wide, factor, WIDE):
        assert difference(scene, other) == {factor}


@pytest.mark.parametrize("factor", FACTORS)
def test_hard_negative_has_another_caption(wide: list[Scene], factor: str) -> None:
    for scene, other in hard_negatives(wide, factor, WIDE):
        assert detailed_caption(scene) != detailed_caption(other)


@pytest.mark.parametrize("factor", FACTORS)
def test_hard_negative_shows_no_held_out_pair(
    drawn: dict[str, list[Scene]], factor: str
) -> None:
    for _, other in hard_negatives(drawn["train"], factor, WORLD):
        assert not kinds(other) & WORLD.held_out_pairs


@pytest.mark.parametrize("factor", FACTORS)
def test_hard_negative_lies_inside_the_picture(wide: list[Scene], factor: str) -> None:
    for _, other in hard_negatives(wide, factor, WIDE):
        for obj in other.objects:
            assert_inside(obj)


@pytest.mark.parametrize("factor", FACTORS)
def test_hard_negative_looks_different(wide: list[Scene], factor: str) -> None:
    for scene, other in hard_negatives(wide, factor, WIDE)[:10]:
        assert render(scene, 32).tobytes() != render(other, 32).tobytes()


@pytest.mark.parametrize("factor", ["place", "size", "count", "companion place"])
def test_hard_negative_covers_no_letter(wide: list[Scene], factor: str) -> None:
    lettered = [scene for scene in wide if scene.letter]
    for _, other in hard_negatives(lettered, factor, WIDE):
        assert other.letter_place is not None
        row, column = divmod(PLACES.index(other.letter_place), 3)
        x, y = 0.19 + 0.31 * column, 0.19 + 0.31 * row
        for obj in other.objects:
            # The letter's center; after the jitter of places an object may touch its rim.
            assert math.hypot(obj.x - x, obj.y - y) > 0.8 * obj.diameter / 2


def test_background_leaves_the_main_object_as_it_was(drawn: dict[str, list[Scene]]) -> None:
    solid = [s for s in drawn["train"] if s.main.texture == "solid" and s.main.shape != "ring"]
    for scene, other in hard_negatives(solid, "background", WORLD):
        center = (round(64 * scene.main.x), round(64 * scene.main.y))
        if scene.companions:
            continue  # one may reach over the center
        assert render(scene).getpixel(center) == render(other).getpixel(center)


def test_unknown_factor_is_refused(wide: list[Scene]) -> None:
    with pytest.raises(ValueError, match="unknown factor 'mood'"):
        WIDE.hard_negative(wide[0], "mood", np.random.default_rng(0))


def test_every_factor_of_a_scene_object_is_compared() -> None:
    geometry = {"x", "y", "diameter"}
    assert {f.name for f in fields(SceneObject)} - geometry == {
        "shape", "color", "size", "texture", "place",
    }  # fmt: skip
