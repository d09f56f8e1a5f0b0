"""Scenes: reproducible, split cleanly, told truthfully and drawn smoothly.

The checker of answers below derives each one from the scene by itself, from the question's words.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from PIL import Image

from mllm.scenes import (
    FACTORS,
    QUESTION_CATEGORIES,
    SPLITS,
    Scene,
    SceneObject,
    ScenesDataset,
    SceneWorld,
    detailed_caption,
    pictures,
    questions,
    render,
    render_pictures,
)
from mllm.scenes.world import BACKGROUNDS, COLORS, LETTERS, PLACES, SHAPES, TEXTURES

WORLD = SceneWorld()
#: Every value there is.
WIDE = SceneWorld(shapes=SHAPES, colors=COLORS, backgrounds=BACKGROUNDS, letters=LETTERS)
NUM_SCENES = 300


def scenes_of(split: str, world: SceneWorld = WORLD, length: int = NUM_SCENES) -> list[Scene]:
    dataset = ScenesDataset(world, split, length)
    return [dataset[i].scene for i in range(length)]


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Scene]]:
    return {split: scenes_of(split) for split in SPLITS}


@pytest.fixture(scope="module")
def wide() -> list[Scene]:
    return scenes_of("train", WIDE)


def kinds(scene: Scene) -> set[tuple[str, str]]:
    return {(obj.shape, obj.color) for obj in scene.objects}


# --- drawing of scenes ---------------------------------------------------------------------------


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


# --- hard negatives ------------------------------------------------------------------------------


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


# --- captions ------------------------------------------------------------------------------------


def test_captions_fit_64_clip_tokens() -> None:
    dataset = ScenesDataset(WIDE, "train", NUM_SCENES, detail_probability=1.0)
    tokenizer = open_clip.SimpleTokenizer(context_length=200)
    captions = [
        caption
        for i in range(NUM_SCENES)
        for caption in (dataset[i].coarse_caption, dataset[i].detailed_caption)
    ]
    assert int((tokenizer(captions) != 0).sum(1).max()) <= 64


def test_coarse_caption_without_details_names_the_main_object_alone() -> None:
    dataset = ScenesDataset(WORLD, "train", 50, detail_probability=0.0)
    for sample in (dataset[i] for i in range(50)):
        main = sample.scene.main
        assert sample.coarse_caption.split()[-1] == main.shape
        assert set(sample.coarse_caption.split()[:-1]) <= {
            "a", "photo", "picture", "of", "one", main.color,
        }  # fmt: skip


def test_every_other_coarse_caption_tells_the_color() -> None:
    dataset = ScenesDataset(WORLD, "train", 400, detail_probability=0.0)
    samples = [dataset[i] for i in range(400)]
    told = sum(sample.scene.main.color in sample.coarse_caption for sample in samples)
    assert 160 < told < 240  # 4 standard deviations of 400 coins


def test_detail_probability_leaves_the_scene_alone() -> None:
    plain, told = (
        ScenesDataset(WORLD, "train", 9, detail_probability=share)[8] for share in (0.0, 1.0)
    )
    assert plain.scene == told.scene


def test_detailed_caption_tells_every_factor() -> None:
    red = SceneObject("star", "red", "large", "dotted", "center", 0.5, 0.5, 0.4)
    blue = [
        SceneObject("cross", "blue", "small", "solid", place, 0.2, 0.2, 0.15)
        for place in ("top left", "left")
    ]
    lone = SceneObject("heart", "green", "small", "solid", "right", 0.8, 0.5, 0.15)
    scene = Scene("night", red, (*blue, lone), "K", "bottom", 0)
    assert detailed_caption(scene) == (
        "a large dotted red star at the center on night, two blue crosses,"
        " a green heart at the right, letter k"
    )


# --- questions -----------------------------------------------------------------------------------

NUMBERS = ["zero", "one", "two", "three", "four"]


def only(found: list[str]) -> str:
    assert len(set(found)) == 1 and found, "the question has no single answer"
    return found[0]


def shape_of(scene: Scene, color: str) -> str:
    found = [obj.shape for obj in scene.objects if obj.color == color]
    assert len(found) == 1
    return found[0]


def named(scene: Scene, shape: str) -> SceneObject:
    (found,) = (obj for obj in scene.objects if obj.shape == shape)
    return found


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def relation(scene: Scene, first: str, words: str, second: str) -> str:
    """By the objects' own centers, which the grid of places does not enter."""
    one, two = named(scene, first), named(scene, second)
    truth = {
        "left of": one.x < two.x, "right of": one.x > two.x,
        "above": one.y < two.y, "below": one.y > two.y,
    }  # fmt: skip
    return yes_no(truth[words])


def count(scene: Scene, plural: str) -> str:
    number = sum(plural in (obj.shape + "s", obj.shape + "es") for obj in scene.objects)
    return NUMBERS[number]


def is_there(scene: Scene, color: str, shape: str) -> str:
    return yes_no(any((o.color, o.shape) == (color, shape) for o in scene.objects))


ANSWERS: list[tuple[str, Callable[..., str]]] = [
    (r"what shape is the (\w+) object\?", shape_of),
    (r"what color is the (\w+)\?", lambda scene, shape: named(scene, shape).color),
    (r"where is the (\w+)\?", lambda scene, shape: named(scene, shape).place),
    (r"how many objects are there\?", lambda scene: NUMBERS[len(scene.objects)]),
    (r"how many (\w+) are there\?", count),
    (r"is the (\w+) (left of|right of|above|below) the (\w+)\?", relation),
    (r"is there a (\w+) (\w+)\?", is_there),
    (r"what letter is written\?", lambda scene: scene.letter.lower()),
]


def derived_answer(scene: Scene, text: str) -> str:
    for pattern, answer in ANSWERS:
        if match := re.fullmatch(pattern, text):
            return answer(scene, *match.groups())
    raise AssertionError(f"a question of no known form: {text}")


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Any]]:
    samples = [ScenesDataset(WIDE, split, 150)[i] for split in SPLITS for i in range(150)]
    return [(sample.scene, question) for sample in samples for question in sample.questions]


def test_every_answer_follows_from_the_scene(asked: list[tuple[Scene, Any]]) -> None:
    for scene, question in asked:
        assert derived_answer(scene, question.text) == question.answer, (scene, question)


def test_places_match_the_thirds_of_the_picture(drawn: dict[str, list[Scene]]) -> None:
    for obj in (obj for scene in drawn["train"] for obj in scene.companions):
        row, column = min(2, int(obj.y * 3)), min(2, int(obj.x * 3))
        assert PLACES[3 * row + column] == obj.place


def test_every_category_is_asked(asked: list[tuple[Scene, Any]]) -> None:
    assert {question.category for _, question in asked} == set(QUESTION_CATEGORIES)


def test_answers_are_lower_case(asked: list[tuple[Scene, Any]]) -> None:
    assert all(question.answer == question.answer.lower() for _, question in asked)


def test_answers_are_one_word_or_a_place(asked: list[tuple[Scene, Any]]) -> None:
    for _, question in asked:
        assert " " not in question.answer or question.answer in PLACES


def test_existence_is_asked_once_with_either_answer(asked: list[tuple[Scene, Any]]) -> None:
    answers = Counter(q.answer for _, q in asked if q.category == "existence")
    assert answers["yes"] == answers["no"]


def test_relations_are_balanced(asked: list[tuple[Scene, Any]]) -> None:
    answers = Counter(q.answer for _, q in asked if q.category == "relation")
    assert 0.4 < answers["yes"] / answers.total() < 0.6  # some 400 fair coins


def test_no_question_denies_a_held_out_pair(asked: list[tuple[Scene, Any]]) -> None:
    for _, question in asked:
        if question.category == "existence" and question.answer == "no":
            _, _, _, color, shape = question.text.removesuffix("?").split()
            assert (shape, color) not in WIDE.held_out_pairs


def test_a_lone_kind_of_object_is_asked_no_false_question() -> None:
    world = SceneWorld(shapes=["circle"], colors=["red"], max_companions=0)
    scene = world.sample(np.random.default_rng(0))
    existence = [
        q for q in questions(scene, world, np.random.default_rng(0)) if q.category == "existence"
    ]
    assert [q.answer for q in existence] == ["yes"]


# --- pictures ------------------------------------------------------------------------------------


def test_picture_has_the_size_that_is_asked_for(wide: list[Scene]) -> None:
    assert render(wide[0], 48).size == (48, 48)


def test_edges_are_anti_aliased() -> None:
    disc = SceneObject("circle", "black", "large", "solid", "center", 0.5, 0.5, 0.5)
    gray = np.asarray(render(Scene("plain", disc, (), None, None, 0), 32).convert("L"))
    inside, outside = int(gray[16, 16]), int(gray[0, 0])
    between = (gray > inside + 20) & (gray < outside - 20)
    # Measured: 36 on a circle 16 pixels wide; a hard edge leaves none.
    assert between.sum() > 20


@pytest.mark.parametrize("size", [16, 32, 224])
def test_picture_looks_the_same_at_every_size(size: int) -> None:
    disc = SceneObject("circle", "red", "large", "solid", "top left", 0.3, 0.3, 0.4)
    scene = Scene("plain", disc, (), "H", "right", 0)
    reference = np.asarray(render(scene, 64).resize((16, 16), Image.Resampling.BOX), dtype=float)
    picture = np.asarray(render(scene, size).resize((16, 16), Image.Resampling.BOX), dtype=float)
    assert np.abs(reference - picture).mean() < 3  # measured: 1.1 of 255 at 16 pixels


def test_every_value_can_be_drawn_at_every_size(wide: list[Scene]) -> None:
    for scene in wide[:60]:
        for size in (8, 33):
            assert render(scene, size).mode == "RGB"


def test_objects_are_drawn_where_the_scene_says() -> None:
    square = SceneObject("cross", "blue", "large", "solid", "bottom right", 0.7, 0.6, 0.5)
    picture = np.asarray(render(Scene("plain", square, (), None, None, 3), 100), dtype=int)
    blue = picture[..., 2] - picture[..., 0] > 100
    rows, columns = np.nonzero(blue)
    assert rows.min() == pytest.approx(35, abs=1) and rows.max() == pytest.approx(84, abs=1)
    assert columns.min() == pytest.approx(45, abs=1) and columns.max() == pytest.approx(94, abs=1)


@pytest.fixture
def picture_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path))
    return tmp_path / "scenes"


def test_cached_pictures_are_those_of_the_samples(picture_cache: Path) -> None:
    dataset = ScenesDataset(WORLD, "test", 7, image_size=16)
    expected = np.stack([np.asarray(dataset[i].image) for i in range(7)])
    np.testing.assert_array_equal(render_pictures(dataset), expected)


def test_several_processes_render_what_one_does(
    picture_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ScenesDataset(WORLD, "test", 7, image_size=16)
    alone = np.array(render_pictures(dataset))
    next(picture_cache.glob("*.npy")).unlink()
    monkeypatch.setattr(pictures, "_CHUNK", 3)  # three chunks, the last one short
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    np.testing.assert_array_equal(render_pictures(dataset), alone)


def test_pictures_are_rendered_once(
    picture_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ScenesDataset(WORLD, "test", 3, image_size=16)
    render_pictures(dataset)

    def forbidden(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(pictures, "_render_all", forbidden)
    assert len(render_pictures(dataset)) == 3


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"split": "train"}, {"length": 4}, {"image_size": 8}, {"world": WIDE}],
    ids=lambda other: next(iter(other)),
)
def test_another_data_set_has_pictures_of_its_own(
    picture_cache: Path, other: dict[str, Any]
) -> None:
    described: dict[str, Any] = {
        "world": WORLD, "split": "test", "length": 3, "seed": 0, "image_size": 16,
    }  # fmt: skip
    render_pictures(ScenesDataset(**described))
    render_pictures(ScenesDataset(**{**described, **other}))
    assert len(list(picture_cache.glob("*.npy"))) == 2


def test_other_drawing_code_has_pictures_of_its_own(
    picture_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm.scenes import dataset as dataset_module

    dataset = ScenesDataset(WORLD, "test", 3, image_size=16)
    before = np.array(render_pictures(dataset))
    monkeypatch.setattr(
        dataset_module, "render", lambda scene, size: render(scene, size).rotate(90)
    )
    assert not np.array_equal(render_pictures(dataset), before)


def test_interrupted_rendering_is_no_cache(
    picture_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ScenesDataset(WORLD, "test", 3, image_size=16)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_render_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_pictures(dataset)
    assert len(render_pictures(dataset)) == 3


def test_every_factor_of_a_scene_object_is_compared() -> None:
    geometry = {"x", "y", "diameter"}
    assert {f.name for f in fields(SceneObject)} - geometry == {
        "shape", "color", "size", "texture", "place",
    }  # fmt: skip
