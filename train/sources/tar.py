"""The members of a tar shard: names and places, ten times faster than ``tarfile`` where the headers
are plain, and by ``tarfile`` where they are not."""

import os
import tarfile
from collections.abc import Iterator

from vision_moe import InputError

_BLOCK = 512
_FILE_TYPES = (b"0", b"\0")


def tar_members(path: str) -> Iterator[tuple[str, int, int]]:
    """``(name, offset of the content, bytes)`` of every file in an uncompressed tar file.

    Raises:
        InputError: It is damaged, cut off, or compressed: pictures are read from their places.
    """
    try:
        plain = list(_plain_members(path))
    except _NotPlain:
        yield from _any_members(path)
        return
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    yield from plain


class _NotPlain(Exception):
    """A header that only ``tarfile`` understands, or none at all."""


def _plain_members(path: str) -> Iterator[tuple[str, int, int]]:
    end = os.path.getsize(path)
    with open(path, "rb", buffering=1 << 16) as file:
        place = 0
        while place + _BLOCK <= end:
            header = file.read(_BLOCK)
            if not header.strip(b"\0"):
                return
            kind = header[156:157]
            checksum = sum(header[:148]) + 256 + sum(header[156:])
            try:
                stored, size = (
                    int(header[148:155].strip(b"\0 "), 8),
                    int(header[124:136].strip(b"\0 ") or b"0", 8),
                )
                name = header[:100].rstrip(b"\0").decode()
                # GNU's own format keeps other things there.
                is_posix = header[257:263] == b"ustar\0"
                prefix = header[345:500].rstrip(b"\0").decode() if is_posix else ""
            except ValueError:
                raise _NotPlain from None
            if checksum != stored or kind not in (*_FILE_TYPES, b"5"):
                raise _NotPlain
            place += _BLOCK
            if place + size > end:
                raise _NotPlain
            if kind != b"5":
                yield f"{prefix}/{name}" if prefix else name, place, size
            place += -(-size // _BLOCK) * _BLOCK
            file.seek(place)


def _any_members(path: str) -> Iterator[tuple[str, int, int]]:
    end = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.offset_data + member.size > end:
                    raise InputError(f"{path}: is cut off in member '{member.name}'")
                if member.isreg():
                    yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise InputError(f"{path}: is no tar file, or a compressed one ({error})") from error
