"""Scenes are drawn reproducibly and split cleanly."""

from typing import Any

import pytest

from mllm.scenes import (
    Scene,
    SceneObject,
    ScenesDataset,
    SceneWorld,
)
from mllm.scenes.world import BACKGROUNDS, COLORS, LETTERS, PLACES, SHAPES, TEXTURES

NUM_SCENES = 300
WORLD = SceneWorld()


def scenes_of(split: str, world: SceneWorld = WORLD, length: int = NUM_SCENES) -> list[Scene]:
    dataset = ScenesDataset(world, split, length)
    return [dataset[i].scene for i in range(length)]


def kinds(scene: Scene) -> set[tuple[str, str]]:
    return {(obj.shape, obj.color) for obj in scene.objects}


def test_a_sample_depends_on_seed_split_and_index_alone() -> None:
    short, long = ScenesDataset(WORLD, "train", 5), ScenesDataset(WORLD, "train", 50)
    assert [short[i].scene for i in range(5)] == [long[i].scene for i in range(5)]


def test_words_are_reproducible() -> None:
    first, second = (ScenesDataset(WORLD, "test", 20)[7] for _ in range(2))
    assert first.questions == second.questions
    assert first.coarse_caption == second.coarse_caption


def test_pictures_are_reproducible() -> None:
    first, second = (ScenesDataset(WORLD, "test", 20)[7].image for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_another_seed_gives_other_scenes() -> None:
    first, second = (ScenesDataset(WORLD, "train", 20, seed) for seed in (0, 1))
    assert not {first[i].scene for i in range(20)} & {second[i].scene for i in range(20)}


def test_splits_share_no_scene(drawn: dict[str, list[Scene]]) -> None:
    assert len({scene for scenes in drawn.values() for scene in scenes}) == 4 * NUM_SCENES


def test_some_pairs_are_held_out() -> None:
    assert WORLD.held_out_pairs


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_held_out_pairs_are_seen_in_the_compositional_split_only(
    drawn: dict[str, list[Scene]], split: str
) -> None:
    assert not set().union(*map(kinds, drawn[split])) & WORLD.held_out_pairs


def test_compositional_main_objects_are_held_out_pairs(drawn: dict[str, list[Scene]]) -> None:
    mains = {(s.main.shape, s.main.color) for s in drawn["compositional"]}
    assert mains == WORLD.held_out_pairs


def test_every_shape_and_color_is_seen_whatever_is_held_out() -> None:
    for share in (0.1, 0.5, 1.0):
        world = SceneWorld(shapes=SHAPES[:3], colors=COLORS[:3], held_out_share=share)
        seen = set().union(*map(kinds, scenes_of("train", world)))
        assert {shape for shape, _ in seen} == set(SHAPES[:3])
        assert {color for _, color in seen} == set(COLORS[:3])


def test_every_value_of_every_factor_occurs(wide: list[Scene]) -> None:
    for name, values in {
        "shape": SHAPES, "color": COLORS, "texture": TEXTURES, "place": PLACES,
    }.items():  # fmt: skip
        assert {getattr(scene.main, name) for scene in wide} == set(values)
    assert {scene.background for scene in wide} == set(BACKGROUNDS)
    assert {scene.letter for scene in wide} == {None, *LETTERS}
    assert {len(scene.companions) for scene in wide} == {0, 1, 2, 3}


def test_objects_lie_inside_the_picture(drawn: dict[str, list[Scene]]) -> None:
    for obj in (obj for scenes in drawn.values() for scene in scenes for obj in scene.objects):
        assert_inside(obj)


def assert_inside(obj: SceneObject) -> None:
    radius = obj.diameter / 2
    assert radius - 1e-9 <= min(obj.x, obj.y) and max(obj.x, obj.y) <= 1 - radius + 1e-9, obj


def test_no_two_things_share_a_place(drawn: dict[str, list[Scene]]) -> None:
    for scene in drawn["train"]:
        places = [obj.place for obj in scene.objects] + [scene.letter_place] * bool(scene.letter)
        assert len(set(places)) == len(places)


def test_main_object_is_larger_than_its_companions(drawn: dict[str, list[Scene]]) -> None:
    for scene in drawn["train"]:
        assert all(other.diameter < scene.main.diameter for other in scene.companions)


@pytest.mark.parametrize(
    "arguments",
    [
        {"shapes": ["blob"]},
        {"colors": []},
        {"max_companions": 4},
        {"held_out_share": 1.5},
        {"letter_probability": -0.1},
    ],
)
def test_impossible_world_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SceneWorld(**arguments)


def test_compositional_split_of_a_world_that_holds_nothing_out_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out_share"):
        ScenesDataset(SceneWorld(held_out_share=0.0), "compositional", 1)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        ScenesDataset(WORLD, "dev", 1)
