"""Where image-text pairs lie, and what tells one state of them from another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.pair_files import LineSource, PairSource, the_file_in
from train.pair_shards import DatasetsSource, LlavaSource, TarSource, find_shards, shard_key
from train.recipe import ImageTextData
from vision_moe import InputError, sha256_file

_SOURCES: dict[str, Callable[[Path, ImageTextData], PairSource]] = {
    "jsonl": LineSource,
    "csv": LineSource,
    "llava_json": LlavaSource,
    "webdataset": TarSource,
    "datasets": DatasetsSource,
}


def open_source(data: ImageTextData) -> PairSource:
    """The pairs of a recipe that lie on the disk.

    Raises:
        InputError: A file is missing, a record is damaged, or more than one picture in a hundred is
            not there.
    """
    if data.path is None:
        raise InputError(f"'data.path' must name the {data.name} file")
    source = _SOURCES[data.name](Path(data.path), data)
    if len(source) < 2:
        raise InputError(f"{data.path}: holds {len(source)} pairs, at least 2 are needed")
    return source


def fingerprints(data: ImageTextData) -> list[str]:
    """What the pairs are known by: a file by its content, more than one by names, sizes and times.

    Paths are no part of it where the content is.
    """
    if data.path is None:
        return []
    path = Path(data.path)
    if data.name in ("jsonl", "csv") and path.is_dir():
        path = the_file_in(path, f".{data.name}")
    if data.name == "webdataset":
        return [f"pairs:{shard_key(find_shards(path))}"]
    if path.is_file():
        return [f"pairs:{sha256_file(path)}"]
    if path.is_dir():
        return [f"pairs:{shard_key(sorted(one for one in path.rglob('*') if one.is_file()))}"]
    return []
