"""``check-data``: every fault is named, and nothing else."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from train.sources.check import DataCheck, check_data
from train.sources.pictures import PictureFile, header_fault
from vision_moe import InputError


def write(folder: Path, *records: Any) -> str:
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json")


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def test_whole_data_has_no_faults(folder: Path, record: dict[str, Any]) -> None:
    found = DataCheck()
    assert not list(check_data(write(folder, record, record), decode=True, found=found))
    assert (found.num_records, found.num_pictures, found.num_faulty) == (2, 1, 0)
    assert found.summary().startswith("2 records (2 with 1 picture), 1 distinct pictures")


def test_every_fault_is_named(folder: Path, record: dict[str, Any]) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "huge.png").write_bytes(png_of(30_000, 30_000))
    images = ["cat.png", "wolf.png", "broken.png", "huge.png", "../cat.png", "dog.jpg"]
    records = [{**record, "id": image, "image": image} for image in images]
    faults = list(check_data(write(folder, *records)))
    assert [fault.partition(": ")[0] for fault in faults] == [
        f"{folder}/data.json, record {n} (id {images[n]!r})" for n in (1, 2, 3, 4)
    ]
    for fault, reason in zip(
        faults, ("no picture", "not an image", "30000x30000 pixels are too many", "outside"),
        strict=True,
    ):  # fmt: skip
        assert reason in fault


def test_truncated_picture_is_found_by_decoding(folder: Path, record: dict[str, Any]) -> None:
    Image.effect_noise((200, 200), 80).save(folder / "cat.png")
    content = (folder / "cat.png").read_bytes()
    (folder / "cat.png").write_bytes(content[: len(content) // 2])
    path = write(folder, record)
    assert not list(check_data(path))
    (fault,) = check_data(path, decode=True)
    assert f"{folder}/cat.png: the image cannot be read" in fault


SAVEABLE = {
    "png": ("RGB", "P", "I;16", "L", "1", "RGBA", "LA"),
    "jpg": ("RGB", "CMYK", "L"),
    "gif": ("RGB", "P", "L", "1"),
    "webp": ("RGB", "RGBA", "P"),
    "bmp": ("RGB", "P", "1"),
    "tiff": ("RGB", "CMYK", "I;16", "P", "RGBA", "F"),
    "ppm": ("RGB", "L", "1"),
}


@pytest.mark.parametrize("suffix", SAVEABLE)
def test_any_mode_is_whole(tmp_path: Path, suffix: str) -> None:
    gray = Image.linear_gradient("L").resize((7, 5))
    for mode in SAVEABLE[suffix]:
        picture = PictureFile(str(tmp_path / f"{mode[:1]}{mode[-1:]}.{suffix}"))
        image = gray.convert("I").convert(mode) if mode == "I;16" else gray.convert("RGB")
        (image if mode == "I;16" else image.convert(mode)).save(picture.path)
        assert header_fault(picture) is None, mode
        assert picture.open().size == (7, 5), mode


def test_picture_of_one_pixel_and_an_animated_one_are_whole(tmp_path: Path) -> None:
    frames = [Image.new("P", (6, 4), color) for color in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(tmp_path / "b.png")
    for name, size in (("a.gif", (6, 4)), ("b.png", (1, 1))):
        picture = PictureFile(str(tmp_path / name))
        assert header_fault(picture) is None
        assert picture.open().size == size


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not an image"),
        (png_of(0, 5), "0x5 pixels"),
        (png_of(2, 5000), "too elongated"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "not an image"),
        (b"\xff\xd8\xff", "not an image"),
    ],
)
def test_header_fault_is_told(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "a").write_bytes(content)
    assert fault in str(header_fault(PictureFile(str(tmp_path / "a"))))


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(check_data(str(tmp_path / "absent.json")))


def test_command_prints_faults_and_ends_with_status_2(folder: Path, record: dict[str, Any]) -> None:
    path = write(folder, record, {**record, "image": "wolf.png"})
    command = [sys.executable, "-m", "mllm", "check-data", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1 and "record 1 (id 'cat-17')" in done.stdout
    assert "1 of 2 records are faulty" in done.stderr
