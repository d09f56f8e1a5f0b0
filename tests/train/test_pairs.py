"""Image-text pairs: what is read, what is refused, and in what order batches come."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vision_moe
from mllm.scenes import ScenesDataset
from train.pairs import (
    FilePairs,
    PairBatches,
    ScenePairs,
    load_pairs,
    random_batches,
    scene_captions,
    scenes_dataset,
)
from train.recipe import ImageTextData
from vision_moe import CLIPMoEModel, InputError

RECORDS = [
    {"image": "red.png", "caption": "a red picture"},
    {"image": "sub/green.png", "caption": "a green picture, with a comma"},
    {"image": "red.png", "caption": 'once more "red"'},
]


@pytest.fixture(scope="module")
def clip(_clip: CLIPMoEModel) -> CLIPMoEModel:
    """Shared by the tests, none of which changes it: to build a tokenizer takes half a second."""
    return _clip


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (40, 32), "red").save(tmp_path / "red.png")
    Image.new("RGB", (32, 32), "green").save(tmp_path / "sub" / "green.png")
    return tmp_path


def jsonl(folder: Path, *records: Any, name: str = "pairs.jsonl") -> ImageTextData:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ImageTextData(name="jsonl", path=str(folder / name))


def refusal(data: ImageTextData, clip: CLIPMoEModel) -> str:
    with pytest.raises(InputError) as caught:
        load_pairs(data, clip, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- files ---------------------------------------------------------------------------------------


def test_jsonl_pairs_keep_their_order(picture_folder: Path, clip: CLIPMoEModel) -> None:
    pairs = load_pairs(jsonl(picture_folder, *RECORDS), clip, seed=0)
    assert torch.equal(pairs.tokens, clip.tokenizer([one["caption"] for one in RECORDS]))


def test_pictures_are_preprocessed_as_the_model_wants(
    picture_folder: Path, clip: CLIPMoEModel
) -> None:
    pairs = load_pairs(jsonl(picture_folder, *RECORDS), clip, seed=0)
    expected = clip.preprocess(vision_moe.open_image(picture_folder / "sub" / "green.png"))
    assert torch.equal(pairs.pixel_values(np.array([1]))[0], expected)


def test_csv_gives_what_jsonl_gives(picture_folder: Path, clip: CLIPMoEModel) -> None:
    path = picture_folder / "pairs.txt"  # the recipe says what it is, not the name
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write
        writer = csv.DictWriter(file, ["caption", "image"])
        writer.writeheader()
        writer.writerows(RECORDS)
    from_csv = load_pairs(ImageTextData(name="csv", path=str(path)), clip, seed=0)
    from_jsonl = load_pairs(jsonl(picture_folder, *RECORDS), clip, seed=0)
    assert isinstance(from_csv, FilePairs) and isinstance(from_jsonl, FilePairs)
    assert from_csv.paths == from_jsonl.paths
    assert torch.equal(from_csv.tokens, from_jsonl.tokens)


def test_image_folder_is_where_paths_start(
    picture_folder: Path, clip: CLIPMoEModel, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    data = jsonl(tmp_path / "elsewhere", *RECORDS)
    data.image_folder = str(picture_folder)
    assert len(load_pairs(data, clip, seed=0).tokens) == 3


def test_only_the_first_pairs_are_read(picture_folder: Path, clip: CLIPMoEModel) -> None:
    data = jsonl(picture_folder, *RECORDS[:2], "damaged")
    data.num_pairs = 2
    assert len(load_pairs(data, clip, seed=0).tokens) == 2


def test_blank_lines_are_no_records(picture_folder: Path, clip: CLIPMoEModel) -> None:
    data = jsonl(picture_folder, "", *RECORDS, " ", "")
    assert len(load_pairs(data, clip, seed=0).tokens) == 3


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ("{damaged", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ({"caption": "x"}, "'image' is missing or empty"),
        ({"image": "red.png"}, "'caption' is missing or empty"),
        ({"image": "red.png", "caption": " "}, "'caption' is missing or empty"),
        ({"image": "red.png", "caption": ["x"]}, "'caption' is missing or empty"),
        ({"image": 5, "caption": "x"}, "'image' is missing or empty"),
        ({"image": "/etc/passwd", "caption": "x"}, "outside the image folder"),
        ({"image": "../red.png", "caption": "x"}, "outside the image folder"),
        ({"image": "blue.png", "caption": "x"}, "there is no picture"),
        ({"image": "sub", "caption": "x"}, "there is no picture"),
        ({"image": "x" * 5000, "caption": "x"}, "there is no picture"),
        ({"image": "a\0b", "caption": "x"}, "there is no picture"),
    ],
    ids=lambda value: str(value)[:40].replace("\0", "0"),
)
def test_damaged_record_is_named(
    picture_folder: Path, clip: CLIPMoEModel, record: Any, fault: str
) -> None:
    data = jsonl(picture_folder, RECORDS[0], record)
    message = refusal(data, clip)
    assert str(data.path) in message and "record 2" in message and fault in message


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("image,words\nred.png,x\n", "record 1: 'caption' is missing or empty"),
        ("image,caption\nred.png,x\nred.png\n", "record 2: 'caption' is missing or empty"),
        ("image,caption\nred.png,x\nred.png," + "y" * 200_000 + "\n", "record 2: not CSV"),
    ],
)
def test_damaged_csv_record_is_named(
    picture_folder: Path, clip: CLIPMoEModel, text: str, fault: str
) -> None:
    path = picture_folder / "pairs.csv"
    path.write_text(text)
    message = refusal(ImageTextData(name="csv", path=str(path)), clip)
    assert str(path) in message and fault in message


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_file_without_pairs_is_refused(
    tmp_path: Path, clip: CLIPMoEModel, form: Any
) -> None:
    (tmp_path / "empty").touch()
    data = ImageTextData(name=form, path=str(tmp_path / "empty"))
    assert "holds 0 pairs" in refusal(data, clip)


def test_single_pair_is_refused(picture_folder: Path, clip: CLIPMoEModel) -> None:
    assert "holds 1 pairs, at least 2" in refusal(jsonl(picture_folder, RECORDS[0]), clip)


def test_single_scene_is_refused(clip: CLIPMoEModel) -> None:
    assert "'data.num_pairs' is 1" in refusal(ImageTextData(num_pairs=1), clip)


def test_missing_file_is_named(tmp_path: Path, clip: CLIPMoEModel) -> None:
    data = ImageTextData(name="jsonl", path=str(tmp_path / "none.jsonl"))
    assert "none.jsonl: cannot be read" in refusal(data, clip)


def test_file_that_is_no_text_is_named(picture_folder: Path, clip: CLIPMoEModel) -> None:
    data = ImageTextData(name="jsonl", path=str(picture_folder / "red.png"))
    assert "red.png: cannot be read" in refusal(data, clip)


def test_path_must_be_given(clip: CLIPMoEModel) -> None:
    assert "'data.path' must name the csv file" in refusal(ImageTextData(name="csv"), clip)


def test_damaged_picture_is_named(picture_folder: Path, clip: CLIPMoEModel) -> None:
    (picture_folder / "red.png").write_bytes(b"\x89PNG no more")
    pairs = load_pairs(jsonl(picture_folder, *RECORDS), clip, seed=0)
    with pytest.raises(InputError, match=r"red\.png"):
        pairs.pixel_values(np.array([0]))


# --- scenes --------------------------------------------------------------------------------------


def test_scenes_pass_the_models_own_preprocessing_unchanged(clip: CLIPMoEModel) -> None:
    data = ImageTextData(num_pairs=4)
    pairs = load_pairs(data, clip, seed=3)
    dataset = scenes_dataset(data, clip, 3)
    expected = torch.stack([clip.preprocess(dataset[i].image) for i in (2, 0)])
    assert torch.equal(pairs.pixel_values(np.array([2, 0])), expected)


@pytest.mark.parametrize("kind", ["coarse", "detailed"])
def test_captions_are_of_the_kind_that_is_asked_for(clip: CLIPMoEModel, kind: Any) -> None:
    data = ImageTextData(num_pairs=4, caption=kind)
    dataset = scenes_dataset(data, clip, 0)
    expected = [getattr(dataset[i], f"{kind}_caption") for i in range(4)]
    assert scene_captions(dataset, kind) == expected
    assert torch.equal(load_pairs(data, clip, 0).tokens, clip.tokenizer(expected))


def test_recipe_describes_the_world(clip: CLIPMoEModel) -> None:
    dataset = scenes_dataset(ImageTextData(num_pairs=5, world={"shapes": ["star"]}), clip, 0)
    assert {dataset[i].scene.main.shape for i in range(5)} == {"star"}


@pytest.mark.parametrize(
    "data",
    [
        ImageTextData(world={"shapes": ["blob"]}),
        ImageTextData(world={"max_companions": "many"}),
        ImageTextData(world={"held_out_share": 0}, split="compositional"),
    ],
)
def test_impossible_world_is_refused(clip: CLIPMoEModel, data: ImageTextData) -> None:
    assert refusal(data, clip).startswith("'data.world': ")


def test_unknown_setting_of_the_world_names_the_nearest(clip: CLIPMoEModel) -> None:
    message = refusal(ImageTextData(world={"colour": ["red"]}), clip)
    assert message == "unknown key 'data.world.colour'; the nearest known one is 'colors'"


def test_scenes_need_a_square_model(clip: CLIPMoEModel) -> None:
    clip = copy.deepcopy(clip)
    assert clip.config.open_clip_config is not None
    clip.config.open_clip_config["vision_cfg"]["image_size"] = [32, 64]
    assert "scenes are square" in refusal(ImageTextData(num_pairs=4), clip)


# --- batches -------------------------------------------------------------------------------------


def test_batch_holds_its_pairs_without_needless_padding(clip: CLIPMoEModel) -> None:
    dataset = ScenesDataset(scenes_dataset(ImageTextData(), clip, 0).world, "train", 6, 0, 32)
    pairs = ScenePairs(dataset, scene_captions(dataset, "coarse"), clip)
    batch = PairBatches(pairs, [np.array([0, 1]), np.array([4, 2, 5])], clip)[1]
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    length = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"], pairs.tokens[[4, 2, 5], :length])
    assert batch["input_ids"][:, -1].any() and not pairs.tokens[[4, 2, 5], length:].any()


def test_random_batches_of_an_epoch_are_disjoint() -> None:
    batches = random_batches(10, 3, 3, seed=0)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len(set(np.concatenate(batches))) == 9


def test_random_batches_go_through_as_many_epochs_as_it_takes() -> None:
    batches = random_batches(10, 3, 7, seed=0)
    assert len(batches) == 7
    assert len(set(np.concatenate(batches[3:6]))) == 9


def test_random_batches_depend_on_the_seed_alone() -> None:
    first, second, other = (random_batches(50, 5, 10, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_batch_is_cut_to_the_number_of_pairs() -> None:
    assert [len(batch) for batch in random_batches(3, 8, 2, seed=0)] == [3, 3]
