"""Pairs in LLaVA's JSON, in WebDataset shards and in Hugging Face data sets."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from train.pair_files import PairSource
from train.pair_sources import fingerprints, open_source
from train.recipe import ImageTextData
from vision_moe import InputError

COLORS = ["red", "lime", "blue", "white"]


def picture(color: str, form: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(content, form)
    return content.getvalue()


def shard(path: Path, *files: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def refusal(data: ImageTextData) -> str:
    with pytest.raises(InputError) as caught:
        open_source(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_holds(source: PairSource, colors: list[str]) -> None:
    """Pictures of those colours, each named by its caption."""
    assert [source.caption(i) for i in range(len(source))] == [f"all {one}" for one in colors]
    for index, color in reversed(list(enumerate(colors))):
        expected = np.asarray(Image.new("RGB", (20, 16), color))
        np.testing.assert_array_equal(np.asarray(source.image(index)), expected)


# --- folders -------------------------------------------------------------------------------------


def test_folder_with_one_list_and_fields_of_other_names(tmp_path: Path) -> None:
    for color in COLORS:
        (tmp_path / f"{color}.png").write_bytes(picture(color))
    rows = [{"file_name": f"{color}.png", "text": f"all {color}"} for color in COLORS]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ImageTextData(
        name="jsonl", path=str(tmp_path), image_field="file_name", caption_field="text"
    )
    assert_holds(open_source(data), COLORS)
    before = fingerprints(data)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    assert fingerprints(data) != before


def test_folder_with_no_list_or_two_is_refused(tmp_path: Path) -> None:
    data = ImageTextData(name="csv", path=str(tmp_path))
    assert "one file *.csv is wanted there, but there is none" in refusal(data)
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    assert "there is a.csv, b.csv" in refusal(data)


# --- LLaVA ---------------------------------------------------------------------------------------


def llava(folder: Path, records: Any) -> ImageTextData:
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(picture(color))
    (folder / "llava.json").write_text(json.dumps(records))
    return ImageTextData(name="llava_json", path=str(folder / "llava.json"))


def dialogue(color: str) -> dict[str, Any]:
    turns = [("human", "<image>\nwhat?"), ("gpt", f"all {color}"), ("human", "?"), ("gpt", "!")]
    return {
        "image": f"{color}.png",
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }


def test_first_answer_is_the_caption(tmp_path: Path) -> None:
    text_only = {"conversations": [{"from": "gpt", "value": "no picture"}]}
    records = [text_only, *(dialogue(color) for color in COLORS)]
    source = open_source(llava(tmp_path, records))
    assert_holds(source, COLORS)
    assert source.name(0).endswith("record 2")


def test_only_the_first_pairs_of_llava_are_read(tmp_path: Path) -> None:
    data = llava(tmp_path, [dialogue("red"), dialogue("blue"), "damaged"])
    data.num_pairs = 2
    assert_holds(open_source(data), ["red", "blue"])


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        ({}, "holds no list"),
        ([5], "record 1: not a JSON object"),
        ([{"image": "red.png"}], "record 1: its first answer, the caption, is missing"),
        ([dialogue("red"), {**dialogue("red"), "image": ["a"]}], "record 2: 'image' must be one"),
        ([dialogue("red"), dialogue("gone")], "there is no picture"),
        ([dialogue("../red"), dialogue("red")], "outside the image folder"),
    ],
)
def test_damaged_llava_record_is_named(tmp_path: Path, records: Any, fault: str) -> None:
    assert fault in refusal(llava(tmp_path, records))


# --- WebDataset ----------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> ImageTextData:
    """Two shards: captions as text in the one, inside JSON in the other."""
    text = [(f"a/{c}.{e}", f) for c in COLORS[:3]
            for e, f in (("jpg", picture(c)), ("txt", f"all {c}\n".encode()))]  # fmt: skip
    shard(tmp_path / "00000.tar", *text)
    record = json.dumps({"caption": "all white", "url": "x"}).encode()
    shard(tmp_path / "00001.tar", ("0.json", record), ("0.webp", picture("white")))
    return ImageTextData(name="webdataset", path=str(tmp_path))


def test_any_pair_of_any_shard_is_found(shards: ImageTextData) -> None:
    assert_holds(open_source(shards), COLORS)


def test_shards_are_named_by_a_pattern(shards: ImageTextData) -> None:
    shards.path = f"{shards.path}/*0.tar"
    assert_holds(open_source(shards), COLORS[:3])


def test_where_pairs_lie_is_found_once(
    shards: ImageTextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_source(shards)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        source = open_source(shards)
    assert_holds(source, COLORS)


def test_changed_shards_are_noticed(shards: ImageTextData) -> None:
    before = fingerprints(shards)
    open_source(shards)
    pair = (("1.png", picture("red")), ("1.txt", b"all red"))
    shard(Path(str(shards.path)) / "00001.tar", *pair)
    assert fingerprints(shards) != before
    assert_holds(open_source(shards), [*COLORS[:3], "red"])


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ([("1.png", b"x")], "sample '1': has no caption, only png"),
        ([("1.txt", b"x")], "sample '1': has no picture, only txt"),
        ([("1.png", b"x"), ("1.txt", b" ")], "its caption is missing or empty"),
        ([("1.png", b"x"), ("1.txt", b"\xff")], "its caption cannot be read"),
        ([("1.png", b"x"), ("1.json", b"[1]")], "its caption cannot be read"),
        ([("1.png", b"x"), ("1.json", b"{}")], "its caption is missing or empty"),
    ],
)
def test_damaged_sample_is_named(
    tmp_path: Path, files: list[tuple[str, bytes]], fault: str
) -> None:
    shard(tmp_path / "0.tar", *files)
    message = refusal(ImageTextData(name="webdataset", path=str(tmp_path / "0.tar")))
    assert "0.tar" in message and fault in message


def test_shard_that_is_cut_short_is_named(shards: ImageTextData) -> None:
    path = Path(str(shards.path)) / "00000.tar"
    path.write_bytes(path.read_bytes()[:1600])
    assert "00000.tar: " in refusal(shards)


@pytest.mark.parametrize("mode", ["w:gz", None])
def test_what_is_no_plain_tar_is_named(tmp_path: Path, mode: Any) -> None:
    if mode:
        tarfile.open(tmp_path / "0.tar", mode).close()
    else:
        (tmp_path / "0.tar").write_bytes(b"no tar" * 1000)
    data = ImageTextData(name="webdataset", path=str(tmp_path))
    assert "0.tar: not an uncompressed tar file" in refusal(data)


def test_no_shards_are_refused(tmp_path: Path) -> None:
    data = ImageTextData(name="webdataset", path=str(tmp_path / "*.tar"))
    assert "there are no tar shards" in refusal(data)


def test_unreadable_picture_of_a_shard_is_named(tmp_path: Path) -> None:
    pair = [("1.png", b"x"), ("1.txt", b"one"), ("2.png", picture("red")), ("2.txt", b"two")]
    shard(tmp_path / "0.tar", *pair)
    source = open_source(ImageTextData(name="webdataset", path=str(tmp_path)))
    with pytest.raises(InputError, match=r"0\.tar, pair at byte \d+: not an image"):
        source.image(0)


# --- datasets ------------------------------------------------------------------------------------


def table(captions: list[Any]) -> datasets.Dataset:
    images = [{"bytes": picture(color), "path": None} for color in COLORS]
    features = datasets.Features(photo=datasets.Image(), text=datasets.Value("string"))
    return datasets.Dataset.from_dict({"photo": images, "text": captions}, features=features)


def data_of(path: Path, **more: Any) -> ImageTextData:
    return ImageTextData(
        name="datasets", path=str(path), image_field="photo", caption_field="text", **more
    )


CAPTIONS = [f"all {color}" for color in COLORS]


def test_saved_data_set_is_read(tmp_path: Path) -> None:
    table(CAPTIONS).save_to_disk(tmp_path / "saved")
    assert_holds(open_source(data_of(tmp_path / "saved")), COLORS)
    assert_holds(open_source(data_of(tmp_path / "saved", num_pairs=2)), COLORS[:2])


def test_split_of_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets.DatasetDict(test=table(CAPTIONS)).save_to_disk(tmp_path / "saved")
    assert_holds(open_source(data_of(tmp_path / "saved", dataset_split="test")), COLORS)


def test_parquet_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    table(CAPTIONS).to_parquet(tmp_path / "files" / "0.parquet")
    assert_holds(open_source(data_of(tmp_path / "files")), COLORS)


def test_missing_column_and_empty_caption_are_named(tmp_path: Path) -> None:
    table(["one", " ", "three", None]).save_to_disk(tmp_path / "saved")
    assert "row 1: its caption is missing or empty" in refusal(data_of(tmp_path / "saved"))
    data = ImageTextData(name="datasets", path=str(tmp_path / "saved"))
    assert "has no column 'image', only photo, text" in refusal(data)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").touch()
    assert "no data set can be loaded" in refusal(data_of(tmp_path))
