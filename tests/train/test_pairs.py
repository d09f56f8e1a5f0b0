"""Image-text pairs: what is read, what is refused, and in what order batches come."""

import copy
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vision_moe
from mllm.scenes import ScenesDataset
from train.pair_batches import PairBatches, cluster_batches, random_batches
from train.pairs import Pairs, ScenePairs, load_pairs, scene_captions, scenes_dataset
from train.recipe import ImageTextData
from vision_moe import CLIPMoEModel, ClusterBatchSampler, InputError

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


def all_tokens(pairs: Pairs) -> torch.Tensor:
    return pairs.tokens(np.arange(len(pairs)))


def refusal(data: ImageTextData, clip: CLIPMoEModel) -> str:
    with pytest.raises(InputError) as caught:
        load_pairs(data, clip, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- files ---------------------------------------------------------------------------------------


def test_jsonl_pairs_keep_their_order(picture_folder: Path, clip: CLIPMoEModel) -> None:
    pairs = load_pairs(jsonl(picture_folder, *RECORDS), clip, seed=0)
    assert torch.equal(all_tokens(pairs), clip.tokenizer([one["caption"] for one in RECORDS]))


def test_pictures_are_preprocessed_as_the_model_wants(
    picture_folder: Path, clip: CLIPMoEModel
) -> None:
    pairs = load_pairs(jsonl(picture_folder, *RECORDS), clip, seed=0)
    expected = clip.preprocess(vision_moe.open_image(picture_folder / "sub" / "green.png"))
    assert torch.equal(pairs.read(np.array([1]))[0][0], expected)


def test_csv_gives_what_jsonl_gives(picture_folder: Path, clip: CLIPMoEModel) -> None:
    path = picture_folder / "pairs.txt"  # the recipe says what it is, not the name
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write
        writer = csv.DictWriter(file, ["caption", "image"])
        writer.writeheader()
        writer.writerows(RECORDS)
    from_csv = load_pairs(ImageTextData(name="csv", path=str(path)), clip, seed=0)
    from_jsonl = load_pairs(jsonl(picture_folder, *RECORDS), clip, seed=0)
    numbers = np.arange(3)
    assert torch.equal(from_csv.read(numbers)[0], from_jsonl.read(numbers)[0])
    assert torch.equal(all_tokens(from_csv), all_tokens(from_jsonl))


def test_image_folder_is_where_paths_start(
    picture_folder: Path, clip: CLIPMoEModel, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    data = jsonl(tmp_path / "elsewhere", *RECORDS)
    data.image_folder = str(picture_folder)
    assert len(load_pairs(data, clip, seed=0)) == 3


def test_only_the_first_pairs_are_read(picture_folder: Path, clip: CLIPMoEModel) -> None:
    data = jsonl(picture_folder, *RECORDS[:2], "damaged")
    data.num_pairs = 2
    assert len(load_pairs(data, clip, seed=0)) == 2


def test_blank_lines_are_no_records(picture_folder: Path, clip: CLIPMoEModel) -> None:
    data = jsonl(picture_folder, "", *RECORDS, " ", "")
    assert len(load_pairs(data, clip, seed=0)) == 3


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
def test_file_without_pairs_is_refused(tmp_path: Path, clip: CLIPMoEModel, form: Any) -> None:
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


def many(folder: Path, number: int, damaged: Sequence[int]) -> ImageTextData:
    """A file of pairs, each with a picture of its own; some of them are no pictures."""
    for index in range(number):
        path = folder / f"{index}.png"
        Image.new("RGB", (32, 32), (index % 256, 0, 0)).save(path)
        if index in damaged:
            path.write_bytes(b"\x89PNG no more")
    records = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(number)]
    return jsonl(folder, *records)


def test_unreadable_picture_is_skipped_and_listed(tmp_path: Path, clip: CLIPMoEModel) -> None:
    pairs = load_pairs(many(tmp_path, 100, [7]), clip, seed=0)
    pixel_values, readable = pairs.read(np.array([6, 7]))
    assert readable.tolist() == [True, False]
    assert not pixel_values[1].any()
    assert list(pairs.skipped) == [7] and "7.png" in pairs.skipped[7]


def test_another_pair_takes_the_place_of_an_unreadable_one(
    tmp_path: Path, clip: CLIPMoEModel
) -> None:
    pairs = load_pairs(many(tmp_path, 100, [7]), clip, seed=0)
    batch = PairBatches(pairs, [np.array([6, 7, 8, 9])], clip)[0]
    width = batch["input_ids"].shape[1]
    captions = all_tokens(pairs)[:, :width]
    (number,) = captions.eq(batch["input_ids"][1]).all(1).nonzero().flatten().tolist()
    assert number not in (6, 7, 8, 9)
    assert torch.equal(batch["pixel_values"][1], pairs.read(np.array([number]))[0][0])


def test_more_than_one_unreadable_picture_in_a_hundred_is_an_error(
    tmp_path: Path, clip: CLIPMoEModel
) -> None:
    pairs = load_pairs(many(tmp_path, 100, [7, 9]), clip, seed=0)
    pairs.read(np.arange(8))
    with pytest.raises(InputError, match=r"2 of 100 pictures cannot be read.*record 10.*9\.png"):
        pairs.read(np.array([9]))


def test_a_few_missing_pictures_are_no_error_at_the_start(
    tmp_path: Path, clip: CLIPMoEModel
) -> None:
    data = many(tmp_path, 200, [])
    (tmp_path / "3.png").unlink()
    assert len(load_pairs(data, clip, seed=0)) == 200
    for index in (5, 6):
        (tmp_path / f"{index}.png").unlink()
    assert "there is no picture" in refusal(data, clip)
    assert "2 more of 200" in refusal(data, clip)


def test_captions_longer_than_the_context_are_counted(
    picture_folder: Path, clip: CLIPMoEModel, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"image": "red.png", "caption": "red " * 40}
    load_pairs(jsonl(picture_folder, RECORDS[0], long), clip, seed=0)
    assert "1 of 2 captions fill the text context of 32 tokens" in capsys.readouterr().err


def test_records_that_span_lines_are_found_again(picture_folder: Path, clip: CLIPMoEModel) -> None:
    path = picture_folder / "pairs.csv"
    path.write_text('image,caption\r\nred.png,"two\nlines"\r\n\r\nred.png,ä €\nred.png,last')
    pairs = load_pairs(ImageTextData(name="csv", path=str(path)), clip, seed=0)
    expected = clip.tokenizer(["two\nlines", "ä €", "last"])
    assert torch.equal(all_tokens(pairs), expected)


# --- scenes --------------------------------------------------------------------------------------


def test_scenes_pass_the_models_own_preprocessing_unchanged(clip: CLIPMoEModel) -> None:
    data = ImageTextData(num_pairs=4)
    pairs = load_pairs(data, clip, seed=3)
    dataset = scenes_dataset(data, clip, 3)
    expected = torch.stack([clip.preprocess(dataset[i].image) for i in (2, 0)])
    assert torch.equal(pairs.read(np.array([2, 0]))[0], expected)


@pytest.mark.parametrize("kind", ["coarse", "detailed"])
def test_captions_are_of_the_kind_that_is_asked_for(clip: CLIPMoEModel, kind: Any) -> None:
    data = ImageTextData(num_pairs=4, caption=kind)
    dataset = scenes_dataset(data, clip, 0)
    expected = [getattr(dataset[i], f"{kind}_caption") for i in range(4)]
    assert torch.equal(all_tokens(load_pairs(data, clip, 0)), clip.tokenizer(expected))


def test_share_of_detailed_captions_is_coarse(clip: CLIPMoEModel) -> None:
    data = ImageTextData(num_pairs=200, caption="detailed", coarse_share=0.3)
    dataset = scenes_dataset(data, clip, 5)
    captions = scene_captions(dataset, data.coarse_share, 5)
    coarse = [captions[i] == dataset[i].coarse_caption for i in range(200)]
    detailed = [captions[i] == dataset[i].detailed_caption for i in range(200)]
    assert all(np.logical_or(coarse, detailed))
    assert 40 <= sum(coarse) <= 80
    assert captions == scene_captions(dataset, data.coarse_share, 5)
    assert torch.equal(all_tokens(load_pairs(data, clip, 5)), clip.tokenizer(captions))


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
    pairs = ScenePairs(dataset, scene_captions(dataset, 1.0, 0), clip)
    chosen = np.array([4, 2, 5])
    batch = PairBatches(pairs, [np.array([0, 1]), chosen], clip)[1]
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    length = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"], pairs.tokens(chosen)[:, :length])
    assert batch["input_ids"][:, -1].any() and not pairs.tokens(chosen)[:, length:].any()


def test_shares_make_the_batch(clip: CLIPMoEModel) -> None:
    pairs = load_pairs(ImageTextData(num_pairs=8), clip, seed=0)
    batches = [np.array([5, 1, 7, 2]), np.array([0, 3, 4, 6])]
    whole = PairBatches(pairs, batches, clip)
    shares = PairBatches(pairs, batches, clip, num_shares=2)
    assert len(shares) == 4
    for key, expected in whole[1].items():
        assert torch.equal(torch.cat([shares[2][key], shares[3][key]]), expected)


def test_shares_come_in_any_order_and_again(clip: CLIPMoEModel) -> None:
    """What is read ahead is used only if it is what comes next."""
    pairs = load_pairs(ImageTextData(num_pairs=8), clip, seed=0)
    batches = [np.array([number, 7 - number]) for number in range(4)]
    shares = PairBatches(pairs, batches, clip)
    for number in (0, 1, 3, 3, 2, 3, 0):
        expected = pairs.read(batches[number])[0]
        assert torch.equal(shares[number]["pixel_values"], expected)


def test_steps_beyond_an_epoch_take_the_next() -> None:
    batches = cluster_batches(ClusterBatchSampler(np.zeros((12, 1), dtype=int), 4, seed=0), 5)
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(np.concatenate(batches[:3])) == sorted(range(12))
    assert not np.array_equal(batches[0], batches[3])


def test_short_batch_is_filled_up_and_no_pair_is_left_out() -> None:
    batches = cluster_batches(ClusterBatchSampler(np.zeros((10, 1), dtype=int), 4, seed=0), 3)
    assert [len(set(batch.tolist())) for batch in batches] == [4, 4, 4]
    assert set(np.concatenate(list(batches))) == set(range(10))


def test_cluster_batch_larger_than_the_data_is_all_of_it() -> None:
    batches = cluster_batches(ClusterBatchSampler(np.zeros((3, 1), dtype=int), 8, seed=0), 2)
    assert [sorted(batch.tolist()) for batch in batches] == [[0, 1, 2]] * 2


def test_any_step_can_be_asked_for_first() -> None:
    """A run that goes on in the middle of an epoch."""
    sampler = ClusterBatchSampler(np.arange(40)[:, None] // 20, 4, seed=0)
    whole = list(cluster_batches(sampler, 25))
    for step in (17, 3, 24):
        assert np.array_equal(cluster_batches(sampler, 25)[step], whole[step])


def test_pairs_that_are_left_out_are_in_no_batch() -> None:
    batches = random_batches(10, 4, 6, seed=0, left_out=np.array([3, 8]))
    assert set(np.concatenate(list(batches))) == set(range(10)) - {3, 8}


def test_random_batches_of_an_epoch_are_disjoint() -> None:
    batches = random_batches(10, 3, 3, seed=0)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len(set(np.concatenate(list(batches)))) == 9


def test_random_batches_go_through_as_many_epochs_as_it_takes() -> None:
    batches = random_batches(10, 3, 7, seed=0)
    assert len(batches) == 7
    assert len(set(np.concatenate(batches[3:6]))) == 9


def test_pairs_fewer_than_a_batch_are_filled_up_with_others() -> None:
    others = np.arange(4, 12)
    batches = random_batches(12, 6, 4, seed=0, left_out=others, back_off=others[:6])
    filled = [set(batch.tolist()) - {0, 1, 2, 3} for batch in batches]
    assert [len(batch) for batch in batches] == [6] * 4
    assert all(len(one) == 2 and one <= set(range(4, 10)) for one in filled)
    assert len(set(map(frozenset, filled))) > 1


def test_random_batches_depend_on_the_seed_alone() -> None:
    first, second, other = (random_batches(50, 5, 10, seed) for seed in (1, 1, 2))
    assert np.array_equal(list(first), list(second))
    assert not np.array_equal(list(first), list(other))


def test_batch_is_cut_to_the_number_of_pairs() -> None:
    assert [len(batch) for batch in random_batches(3, 8, 2, seed=0)] == [3, 3]
