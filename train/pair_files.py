"""Image-text pairs in the lines of a file, JSON or CSV, and what every source has to give.

A source gives any pair by its number, since a batch from one cluster takes pairs from everywhere;
it keeps in memory where each pair lies, not the pair.
"""

from __future__ import annotations

import csv
import io
import json
import mmap
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from train.recipe import ImageTextData
from vision_moe import InputError, open_image

_NUM_LOOKED_FOR = 1000


class PairSource(Protocol):
    """Pairs by number; ``name`` says in an error which one it is."""

    def __len__(self) -> int: ...

    def caption(self, index: int) -> str: ...

    def image(self, index: int) -> Image.Image:
        """RGB.

        Raises:
            InputError: It cannot be read.
        """
        ...

    def name(self, index: int) -> str: ...


def limit_of_skipped(num_pairs: int) -> int:
    """How many of the pairs may be unreadable: one in a hundred."""
    return num_pairs // 100


class LineSource:
    """A JSONL or CSV file with a picture's path and a caption in each record, mapped into memory.

    Args:
        path: The file, or a folder that holds one.
        data: What the recipe says of it.
    """

    def __init__(self, path: Path, data: ImageTextData) -> None:
        self.path = path = the_file_in(path, f".{data.name}") if path.is_dir() else path
        self.root = Path(data.image_folder) if data.image_folder else path.parent
        self.form = data.name
        self.image_field, self.caption_field = data.image_field, data.caption_field
        self.header: list[str] = []
        self.starts = np.frombuffer(self._scan(data.num_pairs), dtype=np.int64)
        if len(self) == 0:
            return
        with path.open("rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        look_for_pictures(self, lambda index: self._picture(self._record(index), index))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def caption(self, index: int) -> str:
        text: str = self._record(index)[self.caption_field]
        return text

    def image(self, index: int) -> Image.Image:
        return open_image(self._picture(self._record(index), index))

    def name(self, index: int) -> str:
        return f"{self.path}, record {index + 1}"

    def _record(self, index: int) -> dict[str, Any]:
        raw = self.content[self.starts[index] : self.starts[index + 1]].decode("utf-8-sig")
        if self.form == "jsonl":
            record: dict[str, Any] = json.loads(raw)
            return record
        row = next(row for row in csv.reader(io.StringIO(raw, newline="")) if row)
        return dict(zip(self.header, row, strict=False))

    def _picture(self, record: dict[str, Any], index: int) -> Path:
        return existing_picture(self.root, record[self.image_field], self.name(index))

    def _scan(self, limit: int | None) -> array[int]:
        """Check every record; where each begins, and where the last one ends."""
        starts = array("q")
        try:
            with (
                self.path.open("rb") as file,
                tqdm(
                    total=self.path.stat().st_size, unit="B", unit_scale=True, delay=2,
                    desc=f"reading {self.path.name}",
                ) as bar,
            ):  # fmt: skip
                lines = _Lines(file, bar)
                records = self._csv_rows(lines) if self.form == "csv" else self._json_rows(lines)
                end = 0
                for start, record in records:
                    where = f"{self.path}, record {len(starts) + 1}"
                    inside(_text(record, self.image_field, where), where)
                    _text(record, self.caption_field, where)
                    starts.append(start)
                    end = lines.position
                    if len(starts) == limit:
                        break
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.path}: cannot be read ({reason})") from error
        except csv.Error as error:
            where = f"{self.path}, record {len(starts) + 1}"
            raise InputError(f"{where}: not CSV ({error})") from error
        starts.append(end)
        return starts

    def _json_rows(self, lines: _Lines) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for line in lines:
            if line.strip():
                number += 1
                yield lines.start, _parse(line, f"{self.path}, record {number}")

    def _csv_rows(self, lines: _Lines) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = csv.reader(lines)
        self.header = next(rows, [])
        start = lines.position
        for row in rows:
            if row:
                yield start, dict(zip(self.header, row, strict=False))
            start = lines.position


class _Lines:
    """Lines of a file as text; ``start`` and ``position`` are where the last one begins and ends.

    utf-8-sig: spreadsheets begin their CSV with a byte-order mark.
    """

    def __init__(self, file: io.BufferedReader, bar: tqdm) -> None:
        self.file = file
        self.bar = bar
        self.start = self.position = 0

    def __iter__(self) -> Iterator[str]:
        for raw in self.file:
            self.start = self.position
            self.position += len(raw)
            self.bar.update(len(raw))
            yield raw.decode("utf-8-sig" if self.start == 0 else "utf-8")


def the_file_in(folder: Path, suffix: str) -> Path:
    """The one file of a folder that ends so."""
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise InputError(f"{folder}: one file *{suffix} is wanted there, but there is {names}")
    return found[0]


def inside(name: str, where: str) -> Path:
    """A relative path that stays below its folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: the picture lies outside the image folder")
    return path


def existing_picture(root: Path, name: str, where: str) -> Path:
    """The file of a picture, if there is one."""
    path = root / inside(name, where)
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise InputError(f"{where}: there is no picture {path}")
    return path


def look_for_pictures(source: PairSource, look: Callable[[int], object]) -> None:
    """Find a wrong image folder now and not in an hour: look for some, evenly spread."""
    chosen = np.linspace(0, len(source) - 1, min(len(source), _NUM_LOOKED_FOR)).astype(int)
    missing: list[InputError] = []
    for index in chosen.tolist():
        try:
            look(index)
        except InputError as error:
            missing.append(error)
    if len(missing) > limit_of_skipped(len(chosen)):
        others = len(missing) - 1
        more = f" (and {others} more of {len(chosen)} that were looked for)" if others else ""
        raise InputError(f"{missing[0]}{more}")


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object")
    return record


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: '{key}' is missing or empty")
    return value
