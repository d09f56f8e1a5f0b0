"""Record files, read one record at a time: JSON, JSONL, Parquet, WebDataset shards, streams.

What a record means is no concern of a reader; a record that cannot even be read carries its fault.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.sources.conversations import PLACEHOLDER, ImageReference, RecordFault
from train.sources.pictures import Picture, PictureBytes, PictureFile, PictureInTar
from train.sources.tar import tar_members
from vision_moe import InputError

_IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "gif", "bmp", "webp", "tif", "tiff", "ppm", "pgm", "avif", "jp2")
)
_BATCH_ROWS = 256


@dataclass(frozen=True)
class Record:
    """One record as it stands in its file.

    Attributes:
        file: Its file, or the name of its stream.
        number: Its place there, from 0.
        share: How much of everything has been read by then, from 0 to 1.
        value: What the file holds.
        fault: Why nothing could be read, else ``None``.
        members: Pictures that stand beside it in its shard, by name.
    """

    file: str
    number: int
    share: float
    value: Any = None
    fault: str | None = None
    members: Mapping[str, PictureInTar] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Names the record in messages."""
        name = self.value.get("id") if isinstance(self.value, dict) else None
        ending = "" if name is None else f" (id {str(name)[:80]!r})"
        return f"{self.file}, record {self.number}{ending}"


@dataclass(frozen=True)
class PictureFolder:
    """Finds a record's pictures.

    Attributes:
        root: Where relative paths start.
        allow_outside: Pictures may lie outside of ``root``.
    """

    root: str
    allow_outside: bool = False

    def find(self, reference: ImageReference, record: Record) -> Picture:
        """The picture that a record names.

        Raises:
            RecordFault: It is not there, or lies outside of the folder.
        """
        if isinstance(reference, bytes):
            return PictureBytes(reference, f"{record.where}: the picture")
        if reference in record.members:
            return record.members[reference]
        root = os.path.abspath(self.root)
        path = os.path.normpath(os.path.join(root, reference))
        if not self.allow_outside and not path.startswith(root.rstrip(os.sep) + os.sep):
            raise RecordFault(f"the picture {reference!r} lies outside the image folder '{root}'")
        try:
            found = os.path.isfile(path)
        except ValueError:  # a name that no file can have
            found = False
        if not found:
            raise RecordFault(f"there is no picture '{path}'")
        return PictureFile(path)


def container_of(path: str) -> str:
    """``json``, ``parquet`` or ``webdataset``, by the ending of a file's name."""
    suffix = Path(path).suffix
    if suffix == ".parquet":
        return "parquet"
    return "webdataset" if suffix in (".tar", ".gz", ".tgz", ".zst") else "json"


def read_records(path: str, container: str | None = None) -> Iterator[Record]:
    """Every record of the files that ``path`` names.

    Args:
        path: A file; with ``*`` or ``{000..123}`` several.
        container: As :func:`container_of` has it; by the file's name by default.

    Raises:
        InputError: There is no such file, or none of its records can be read.
    """
    files = _expand(path)
    for number, file in enumerate(files):
        reader = _READERS[container or container_of(file)]
        for record in reader(file):
            share = (number + record.share) / len(files)
            yield Record(
                record.file, record.number, share, record.value, record.fault, record.members
            )


def stream_records(name: str, split: str, limit: int | None) -> Iterator[Record]:
    """Records of a data set of the ``datasets`` library, which are fetched as they are read."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "data source 'datasets' needs the package datasets: pip install 'mllm-moe[data]'"
        ) from error
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True).decode(False)
        rows = stream if limit is None else stream.take(limit)
        for number, row in enumerate(rows):
            yield Record(f"data set '{name}'", number, number / limit if limit else 0.0, row)
    except InputError:
        raise
    except Exception as error:  # whatever the network, the hub and the files can do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"data set '{name}', split '{split}': cannot be read ({reason})"
        ) from error


def _expand(path: str) -> list[str]:
    files = []
    for one in _expand_ranges(path):
        found = sorted(glob.glob(one)) if glob.has_magic(one) and not os.path.exists(one) else [one]
        files += found
    for file in files or [path]:
        if not os.path.isfile(file):
            raise InputError(f"{file}: there is no such file")
    return files


def _expand_ranges(path: str) -> list[str]:
    """``a-{00..02}.tar`` -> ``a-00.tar``, ``a-01.tar``, ``a-02.tar``."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None:
        return [path]
    first, last = match.groups()
    before, after = path[: match.start()], path[match.end() :]
    numbers = range(int(first), int(last) + 1)
    names = [f"{before}{number:0{len(first)}d}{after}" for number in numbers]
    return [name for one in names for name in _expand_ranges(one)]


def _read_json(file: str) -> Iterator[Record]:
    """A list of records, or one record a line."""
    try:
        with open(file, "rb") as stream:
            first = next((line.lstrip() for line in stream if line.strip()), b"")
            stream.seek(0)
            # One object over many lines would be no list either: its first line fails.
            if first[:1] == b"{":
                yield from _read_lines(file, stream)
                return
            content = stream.read()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(values, list) or not values:
        raise InputError(f"{file}: holds no list of records")
    for number, value in enumerate(values):
        yield Record(file, number, number / len(values), value)


def _read_lines(file: str, stream: Any) -> Iterator[Record]:
    size = max(1, os.fstat(stream.fileno()).st_size)
    place = number = 0
    for line in stream:
        place += len(line)
        if not line.strip():
            continue
        try:
            yield Record(file, number, place / size, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield Record(file, number, place / size, fault=f"is not JSON ({error})")
        number += 1


def _read_parquet(file: str) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{file}: Parquet needs the package pyarrow: pip install 'mllm-moe[data]'"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            total = max(1, parquet.metadata.num_rows)
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield Record(file, number, number / total, row)
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{file}: cannot be read as Parquet ({reason})") from error


def _read_webdataset(file: str) -> Iterator[Record]:
    """Members whose names agree up to the first dot are one record.

    ``x.json`` is the record; without one, ``x.txt`` is what is said of the picture. Pictures that
    the record does not name are the shard's, in their order.
    """
    size = max(1, os.path.getsize(file))
    group: dict[str, tuple[int, int]] = {}
    current: str | None = None
    number = 0
    with open(file, "rb") as stream:
        for name, offset, num_bytes in tar_members(file):
            folder, _, base = name.rpartition("/")
            key = f"{folder}/{base.partition('.')[0]}"
            if current is not None and key != current:
                yield _shard_record(file, number, offset / size, group, stream)
                number += 1
                group = {}
            current = key
            group[name] = (offset, num_bytes)
        if current is not None:
            yield _shard_record(file, number, 1.0, group, stream)


def _shard_record(
    file: str, number: int, share: float, group: dict[str, tuple[int, int]], stream: Any
) -> Record:
    def text_of(name: str) -> bytes:
        offset, num_bytes = group[name]
        stream.seek(offset)
        content: bytes = stream.read(num_bytes)
        return content

    members: dict[str, PictureInTar] = {}
    names: list[str] = []
    for name, place in group.items():
        if name.rpartition(".")[2].lower() in _IMAGE_SUFFIXES:
            members[name] = PictureInTar(file, name, *place)
            names.append(name)
            # Records name their pictures without the shard's folders, too.
            members.setdefault(name.rpartition("/")[2], members[name])
    described = [name for name in group if name.endswith(".json")]
    captions = [name for name in group if name.endswith(".txt")]
    try:
        if described:
            value = json.loads(text_of(described[0]))
        elif captions:
            value = _caption_record(text_of(captions[0]).decode(), names)
        else:
            raise ValueError(f"no .json and no .txt beside {next(iter(group))!r}")
    except (ValueError, RecursionError) as error:
        fault = f"its members cannot be read ({error})"
        return Record(file, number, share, fault=fault, members=members)
    if isinstance(value, dict):
        value.setdefault("id", next(iter(group)).partition(".")[0])
        given = value.get("image", value.get("images"))
        is_named = given if isinstance(given, list) else [given]
        if names and not any(isinstance(one, str) and one in members for one in is_named):
            value = {**value, "images": names}
            value.pop("image", None)
    return Record(file, number, share, value, members=members)


def _caption_record(caption: str, names: Sequence[str]) -> dict[str, Any]:
    asked = "\n".join([PLACEHOLDER] * len(names))
    return {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": caption}]}


_READERS: dict[str, Callable[[str], Iterator[Record]]] = {
    "json": _read_json,
    "parquet": _read_parquet,
    "webdataset": _read_webdataset,
}
