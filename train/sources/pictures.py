"""Where a record's pictures are: files below a folder, members of a tar shard, or bytes of a
record. Each can be opened, named and measured by its header."""

import hashlib
import io
import os
import struct
import warnings
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from PIL import Image

from mllm.cache import cache_dir
from vision_moe import InputError, atomic_write_bytes, open_image
from vision_moe.preprocessing import MAX_ASPECT_RATIO

# What Pillow opens without a warning: 89 million pixels.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**27
_HEAD_BYTES = 4096


class Picture(Protocol):
    """A picture that can be opened again and again; ``label`` names it in messages."""

    @property
    def label(self) -> str: ...

    def open(self) -> Image.Image:
        """RGB; raises :class:`InputError` with the picture's name."""
        ...

    def identity(self) -> str:
        """Equal strings are equal pictures."""
        ...

    def head(self) -> bytes:
        """The first bytes, at least as many as most headers need."""
        ...

    def stream(self) -> BinaryIO:
        """All bytes."""
        ...


@dataclass(frozen=True)
class PictureFile:
    """A file of its own."""

    path: str

    @property
    def label(self) -> str:
        return self.path

    def open(self) -> Image.Image:
        return open_image(self.path)

    def identity(self) -> str:
        status = os.stat(self.path)
        return f"file {os.path.abspath(self.path)} {status.st_size} {status.st_mtime_ns}"

    def head(self) -> bytes:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            return os.read(handle, _HEAD_BYTES)
        finally:
            os.close(handle)

    def stream(self) -> BinaryIO:
        return open(self.path, "rb")


@dataclass(frozen=True)
class PictureInTar:
    """A member of an uncompressed tar file."""

    shard: str
    name: str
    offset: int
    size: int

    @property
    def label(self) -> str:
        return f"{self.shard}, member {self.name}"

    def open(self) -> Image.Image:
        return _open_bytes(self._read(self.size), self.label)

    def identity(self) -> str:
        status = os.stat(self.shard)
        return (
            f"tar {os.path.abspath(self.shard)} {status.st_size} {status.st_mtime_ns} {self.offset}"
        )

    def head(self) -> bytes:
        return self._read(min(self.size, _HEAD_BYTES))

    def stream(self) -> BinaryIO:
        return io.BytesIO(self._read(self.size))

    def _read(self, num_bytes: int) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(num_bytes)


@dataclass(frozen=True)
class PictureBytes:
    """A picture in memory, as record readers give it."""

    content: bytes
    label: str

    def open(self) -> Image.Image:
        return _open_bytes(self.content, self.label)

    def identity(self) -> str:
        return f"sha256 {hashlib.sha256(self.content).hexdigest()}"

    def head(self) -> bytes:
        return self.content

    def stream(self) -> BinaryIO:
        return io.BytesIO(self.content)

    def kept(self) -> PictureFile:
        """The same picture as a file in the cache, under the hash of its content."""
        digest = hashlib.sha256(self.content).hexdigest()
        path = cache_dir() / "pictures" / digest[:2] / digest
        if not path.is_file():
            atomic_write_bytes(path, self.content)
        return PictureFile(str(path))


def _open_bytes(content: bytes, name: str) -> Image.Image:
    try:
        return open_image(io.BytesIO(content))
    except InputError as error:
        raise InputError(str(error).replace("the image", name, 1)) from error


def header_fault(picture: Picture) -> str | None:
    """What is wrong with a picture by its header alone, or ``None``."""
    fault = _header_fault(picture)
    return None if fault is None else f"{picture.label}: {fault}"


def _header_fault(picture: Picture) -> str | None:
    try:
        head = picture.head()
        size = _size_in_head(head)
        if size is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # too many pixels: told below
                with picture.stream() as stream, Image.open(stream) as image:
                    size = image.size
    except OSError as error:
        return error.strerror or "it is not an image that can be read"
    except Exception:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        return "it is not an image that can be read"
    width, height = size
    if width < 1 or height < 1:
        return f"it has {width}x{height} pixels"
    if width * height > MAX_PIXELS:
        return f"{width}x{height} pixels are too many"
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return f"{width}x{height} pixels are too elongated"
    return None


def _size_in_head(head: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG or JPEG, several times faster than Pillow; ``None`` of others."""
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR" and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
        return width, height
    if head[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(head) and head[place] == 0xFF:
        marker = head[place + 1]
        # Start of frame; C4, C8 and CC in its range are tables.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", head[place + 5 : place + 9])
            return width, height
        place += 2 + int.from_bytes(head[place + 2 : place + 4], "big")
    return None
