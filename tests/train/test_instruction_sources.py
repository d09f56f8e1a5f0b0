"""Samples from scenes and easy-VQA, and how sources are joined."""

import re
from typing import Any

import pytest

from train.instruction_sources import load_sources
from train.recipe import InstructionSource
from vision_moe import InputError


def scenes(name: str = "scenes_questions", **options: Any) -> InstructionSource:
    return InstructionSource(name=name, **{"num_images": 3, **options})  # type: ignore[arg-type]


def test_scenes_questions_are_capped() -> None:
    data = load_sources([scenes(questions_per_image=2)], seed=0)
    assert [len(sample.turns) for sample in data.samples] == [2, 2, 2]


def test_scenes_captions_have_one_turn() -> None:
    data = load_sources([scenes("scenes_captions")], seed=0)
    assert all(len(sample.turns) == 1 for sample in data.samples)


def test_picture_of_a_key_is_its_own() -> None:
    data = load_sources([scenes()], seed=0)
    pictures = {data.open_images[sample.image_keys[0]]().tobytes() for sample in data.samples}
    assert len(pictures) == 3


def test_sources_are_joined_with_keys_of_their_own() -> None:
    data = load_sources([scenes(), scenes("scenes_captions")], seed=0)
    assert [sample.image_keys for sample in data.samples] == [(key,) for key in range(6)]
    assert len(data.open_images) == len(data.image_identities) == 6


def test_same_scene_has_the_same_identity_in_every_source() -> None:
    data = load_sources([scenes(), scenes("scenes_captions")], seed=0)
    assert data.image_identities[:3] == data.image_identities[3:]


def test_scenes_without_a_number_are_refused() -> None:
    with pytest.raises(InputError, match="num_images"):
        load_sources([scenes(num_images=None)], seed=0)


def test_unknown_world_option_is_named() -> None:
    with pytest.raises(InputError, match="shapse"):
        load_sources([scenes(world={"shapse": ["circle"]})], seed=0)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="trian"):
        load_sources([scenes(split="trian")], seed=0)


def test_easy_vqa_draws_pictures_with_all_their_questions() -> None:
    source = InstructionSource(name="easy_vqa", num_images=5)
    data = load_sources([source], seed=0)
    assert len(data.samples) == len(data.open_images) == 5
    assert all(len(sample.turns) > 3 for sample in data.samples)
    assert data.open_images[0]().size == (64, 64)


@pytest.mark.parametrize("balanced", [False, True])
def test_balanced_answers_cannot_be_guessed_from_the_words(balanced: bool) -> None:
    source = InstructionSource(name="easy_vqa", num_images=3000, balance_answers=balanced)
    turns = [turn for sample in load_sources([source], seed=0).samples for turn in sample.turns]
    asked = [answer for question, answer in turns if re.match(r"is there a \w+ shape", question)]
    share_of_yes = asked.count("yes") / len(asked)
    assert share_of_yes == pytest.approx(0.5 if balanced else 0.13, abs=0.05)


def test_categories_choose_the_questions() -> None:
    source = InstructionSource(name="easy_vqa", num_images=20, categories=["color"])
    samples = load_sources([source], seed=0).samples
    assert all("color" in question for sample in samples for question, _ in sample.turns)


def test_unknown_category_is_refused() -> None:
    source = InstructionSource(name="easy_vqa", num_images=20, categories=["colour"])
    with pytest.raises(InputError, match="colour.*color, shape, yes-no"):
        load_sources([source], seed=0)


def test_easy_vqa_draw_depends_on_the_seed() -> None:
    source = InstructionSource(name="easy_vqa", num_images=5)
    first, same, other = (load_sources([source], seed) for seed in (0, 0, 1))
    assert first.image_identities == same.image_identities != other.image_identities


def test_more_pictures_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="4000"):
        load_sources([InstructionSource(name="easy_vqa", num_images=5000)], seed=0)


def test_samples_know_their_source() -> None:
    data = load_sources([scenes(), scenes("scenes_captions", num_images=2)], seed=0)
    assert [sample.source_number for sample in data.samples] == [0, 0, 0, 1, 1]
