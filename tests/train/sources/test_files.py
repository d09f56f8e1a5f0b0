"""The same record from every kind of file, and what is left out."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from train.instruction_sources import load_sources
from train.recipe import InstructionSource
from train.sources.base import InstructionData
from vision_moe import InputError

TURNS = (("What is it?", "A cat."), ("Its color?", "Black."))


def load(name: str, path: Path | str, **options: Any) -> InstructionData:
    return load_sources([InstructionSource(name=name, path=str(path), **options)], seed=0)  # type: ignore[arg-type]


def write_json(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def write_shard(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def without_id(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("image", "conversations")}


def write(container: str, folder: Path, record: dict[str, Any]) -> tuple[str, Path]:
    """A file of one record with its picture: source name and path."""
    content = (folder / "cat.png").read_bytes()
    inline = {**without_id(record), "image": {"bytes": content, "path": None}}
    if container == "llava_json":
        return container, write_json(folder / "data.json", record)
    if container == "jsonl":
        (folder / "data.jsonl").write_text(f"\n{json.dumps(record)}\n\n")
        return container, folder / "data.jsonl"
    if container == "parquet":
        return container, write_parquet(folder / "data.parquet", [inline])
    if container == "datasets":
        pytest.importorskip("datasets")
        (folder / "set").mkdir()
        write_parquet(folder / "set" / "train-0.parquet", [inline])
        return container, folder / "set"
    form = tarfile.GNU_FORMAT if container.endswith("gnu") else tarfile.PAX_FORMAT
    name = "é" * 80 if container.endswith("pax") else "0001"  # a name that needs a pax header
    members = {f"{name}.png": content, f"{name}.json": json.dumps(record).encode()}
    return "webdataset", write_shard(folder / "shard.tar", members, form)


@pytest.mark.parametrize(
    "container",
    ["llava_json", "jsonl", "parquet", "datasets", "webdataset gnu", "webdataset pax"],
)
def test_record_is_the_same_from_every_container(
    folder: Path, record: dict[str, Any], container: str
) -> None:
    data = load(*write(container, folder, record))
    (sample,) = data.samples
    assert sample.turns == TURNS
    assert sample.is_dialogue and sample.image_keys == (0,)
    assert data.open_images[0]().size == (8, 6)
    assert len(data.image_identities) == 1


def test_records_of_one_picture_share_it(folder: Path, record: dict[str, Any]) -> None:
    data = load("llava_json", write_json(folder / "data.json", record, record))
    assert (len(data.samples), len(data.open_images)) == (2, 1)


def test_shards_are_read_by_their_numbers(folder: Path, record: dict[str, Any]) -> None:
    for number in range(3):
        members = {
            "a.png": (folder / "cat.png").read_bytes(),
            "a.json": json.dumps(record).encode(),
        }
        write_shard(folder / f"shard-{number:02d}.tar", members)
    assert len(load("webdataset", folder / "shard-{00..01}.tar").samples) == 2
    assert len(load("webdataset", folder / "shard-*.tar").samples) == 3


def test_caption_beside_a_picture_is_a_sample(folder: Path) -> None:
    members = {"1.txt": b"A cat.", "1.png": (folder / "cat.png").read_bytes(), "2.txt": b"Text."}
    data = load("webdataset", write_shard(folder / "shard.tar", members))
    assert [(s.image_keys, s.turns) for s in data.samples] == [
        ((0,), (("", "A cat."),)),
        ((), (("", "Text."),)),
    ]


@pytest.mark.parametrize("container", ["parquet", "datasets"])
def test_first_records_alone_are_read_of_a_stream(
    folder: Path, record: dict[str, Any], container: str
) -> None:
    rows = [{**without_id(record), "image": None, "conversations": [
        {"from": "human", "value": str(number)}, {"from": "gpt", "value": "yes"}]}
        for number in range(5)]  # fmt: skip
    (folder / "set").mkdir()
    path = write_parquet(folder / "set" / "train.parquet", rows)
    data = load(container, path if container == "parquet" else path.parent, num_images=2)
    assert [sample.turns[0][0] for sample in data.samples] == ["0", "1"]


def test_one_fault_in_a_hundred_is_left_out_and_listed(
    folder: Path, record: dict[str, Any]
) -> None:
    broken = {**record, "id": "dog-3", "image": "wolf.png"}
    data = load("llava_json", write_json(folder / "data.json", *[record] * 99, broken))
    assert len(data.samples) == 99
    assert data.skipped.num_seen == 100
    (fault,) = data.skipped.faults
    assert "data.json, record 99 (id 'dog-3'): there is no picture" in fault


def test_more_faults_stop_the_run(folder: Path, record: dict[str, Any]) -> None:
    broken = {**record, "image": "wolf.png"}
    path = write_json(folder / "data.json", *[record] * 98, broken, broken)
    with pytest.raises(InputError, match=r"record 98 .*2 of 100 samples .* more than 1%"):
        load("llava_json", path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../cat.png", "sub/../../cat.png", "a\0b"])
def test_picture_outside_the_folder_is_refused(
    folder: Path, record: dict[str, Any], name: str
) -> None:
    (folder / "data").mkdir()
    path = write_json(folder / "data" / "data.json", {**record, "image": name})
    with pytest.raises(InputError, match="record 0 .*(outside the image folder|no picture)"):
        load("llava_json", path)


def test_picture_outside_the_folder_is_read_where_allowed(
    folder: Path, record: dict[str, Any]
) -> None:
    (folder / "data").mkdir()
    path = write_json(folder / "data" / "data.json", {**record, "image": "../cat.png"})
    data = load("llava_json", path, allow_outside=True)
    assert data.open_images[0]().size == (8, 6)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("llava_json", b"[", "cannot be read as JSON"),
        ("llava_json", b"[]", "holds no list of records"),
        ("llava_json", b"", "cannot be read as JSON"),
        ("jsonl", b"{\xff}\n", "record 0: is not JSON"),
        ("jsonl", b'{"a": ' + b"[" * 100_000, "record 0: is not JSON"),
        ("parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("webdataset", b"\x1f\x8b not a tar" * 100, "no tar file, or a compressed one"),
    ],
)
def test_damaged_file_is_told(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(InputError, match=f"data.*{fault}"):
        load(name, tmp_path / "data")


def test_cut_off_shard_is_told(folder: Path) -> None:
    shard = write_shard(folder / "shard.tar", {"a.png": bytes(5000), "a.txt": b"x"})
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(InputError, match="shard.tar: .*(cut off|no tar)"):
        load("webdataset", shard)


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.json: there is no such file"):
        load("llava_json", tmp_path / "absent.json")


def test_unread_pictures_have_no_number(folder: Path, record: dict[str, Any]) -> None:
    Image.new("RGB", (5, 5)).save(folder / "b.png")
    path = write_json(folder / "data.json", record, {**record, "image": "b.png"})
    data = load("llava_json", path, num_images=1)
    assert (len(data.samples), len(data.open_images)) == (1, 1)


def truncated(path: Path) -> str:
    Image.effect_noise((200, 200), 80).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    return path.name


def test_damaged_picture_is_left_out_and_listed(folder: Path, record: dict[str, Any]) -> None:
    broken = {**record, "id": "noise", "image": truncated(folder / "noise.png")}
    path = write_json(folder / "data.json", *[record] * 99, broken)
    for _ in range(2):  # found, and then known
        data = load("llava_json", path)
        assert (len(data.samples), len(data.open_images)) == (99, 1)
        (fault,) = data.skipped.faults
        assert "record 99 (id 'noise')" in fault and "noise.png: the image cannot be read" in fault


def test_repaired_picture_is_read_again(folder: Path, record: dict[str, Any]) -> None:
    truncated(folder / "cat.png")
    path = write_json(folder / "data.json", record)
    with pytest.raises(InputError, match="cat.png: the image cannot be read"):
        load("llava_json", path)
    Image.new("RGB", (8, 6)).save(folder / "cat.png")
    assert len(load("llava_json", path).samples) == 1
