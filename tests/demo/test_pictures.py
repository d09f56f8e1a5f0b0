"""Uploaded files: read as pictures, or refused in a sentence that names them by their name."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image

from demo.pictures import open_upload
from vision_moe import InputError

MAX_PIXELS = 1_000_000


def png_that_claims(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"


def refusal(path):
    with pytest.raises(InputError) as refused:
        open_upload(path, MAX_PIXELS)
    assert str(path.parent) not in str(refused.value)
    assert path.name in str(refused.value)
    return str(refused.value)


def test_picture_is_read(photo):
    picture = open_upload(photo, MAX_PIXELS)
    assert (picture.image.size, picture.image.mode, picture.notes) == ((96, 64), "RGB", [])


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"GIF89a", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
)
def test_file_that_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "cat.png").write_bytes(content)
    assert "not a picture" in refusal(tmp_path / "cat.png")


def test_truncated_picture_is_refused(tmp_path, photo):
    content = photo.read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refusal(tmp_path / "half.jpg")


@pytest.mark.parametrize("side", [1001, 12_000, 30_000])
def test_huge_picture_is_refused_by_its_header(tmp_path, side):
    (tmp_path / "huge.png").write_bytes(png_that_claims(side, side))
    assert "up to 1 million" in refusal(tmp_path / "huge.png")


def test_animation_shows_its_first_frame_and_says_so(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    picture = open_upload(tmp_path / "a.gif", MAX_PIXELS)
    assert picture.image.getpixel((0, 0)) == (255, 0, 0)
    assert picture.notes == ["'a.gif' has 3 frames; the first is shown to the model"]


def test_printing_colors_are_converted_and_said(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    picture = open_upload(tmp_path / "a.jpg", MAX_PIXELS)
    assert picture.image.mode == "RGB"
    assert "CMYK" in picture.notes[0]
