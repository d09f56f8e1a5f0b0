"""Image-text pairs in other people's containers: LLaVA's JSON, WebDataset shards, ``datasets``.

See :mod:`train.pair_files` for what a source is.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mllm.cache import cache_dir
from train.pair_files import existing_picture, inside, look_for_pictures
from train.processes import processes
from train.recipe import ImageTextData
from vision_moe import InputError, atomic_write_bytes, open_image

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_CAPTIONS = ("txt", "caption", "json")
#: Of a pair: shard, where the picture begins, its bytes, where the caption begins, its bytes, and
#: whether that is JSON.
_INDEX_COLUMNS = 6


class LlavaSource:
    """LLaVA's JSON: a list of ``{"image", "conversations"}``; the first answer is the caption.

    Records without a picture are left out.  The texts stay in memory: the format is one list.
    """

    def __init__(self, path: Path, data: ImageTextData) -> None:
        self.path = path
        self.root = Path(data.image_folder) if data.image_folder else path.parent
        self.pairs: list[tuple[str, str]] = []
        self.numbers = array("q")
        for number, record in enumerate(_json_list(path), start=1):
            where = f"{path}, record {number}"
            if not isinstance(record, dict):
                raise InputError(f"{where}: not a JSON object")
            if record.get("image") is None:
                continue
            image, caption = record["image"], _first_answer(record, where)
            if not isinstance(image, str) or not image.strip():
                raise InputError(f"{where}: 'image' must be one path")
            inside(image, where)
            self.pairs.append((image, caption))
            self.numbers.append(number)
            if len(self.pairs) == data.num_pairs:
                break
        look_for_pictures(self, self._file)

    def __len__(self) -> int:
        return len(self.pairs)

    def caption(self, index: int) -> str:
        return self.pairs[index][1]

    def image(self, index: int) -> Image.Image:
        return open_image(self._file(index))

    def name(self, index: int) -> str:
        return f"{self.path}, record {self.numbers[index]}"

    def _file(self, index: int) -> Path:
        return existing_picture(self.root, self.pairs[index][0], self.name(index))


def _json_list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, list):
        raise InputError(f"{path}: holds no list of records")
    return content


def _first_answer(record: dict[str, Any], where: str) -> str:
    conversation = record.get("conversations")
    for turn in conversation if isinstance(conversation, list) else []:
        if isinstance(turn, dict) and turn.get("from") == "gpt":
            text = turn.get("value")
            if isinstance(text, str) and text.strip():
                return text
            break
    raise InputError(f"{where}: its first answer, the caption, is missing or empty")


class TarSource:
    """WebDataset shards: tar files in which a pair's files share a name and lie side by side.

    Where each pair lies is found once and kept in the user's cache folder, 48 bytes a pair, mapped
    into memory: a batch of a cluster takes its pairs from all shards.

    Args:
        path: A shard, a folder of shards, or a pattern such as ``shards/*.tar``.
        data: What the recipe says of it.
    """

    def __init__(self, path: Path, data: ImageTextData) -> None:
        self.shards = find_shards(path)
        self.caption_field = data.caption_field
        file = cache_dir() / "webdataset" / f"{shard_key(self.shards, data.caption_field)}.npy"
        with processes().main_process_first():
            if not file.is_file():
                content = io.BytesIO()
                np.save(content, self._index())
                atomic_write_bytes(file, content.getvalue())
        self.index = np.load(file, mmap_mode="r")[: data.num_pairs]

    def __len__(self) -> int:
        return len(self.index)

    def caption(self, index: int) -> str:
        shard, _, _, start, size, is_json = self.index[index].tolist()
        return self._text(self._bytes(shard, start, size), bool(is_json), self.name(index))

    def image(self, index: int) -> Image.Image:
        shard, start, size = self.index[index, :3].tolist()
        return open_bytes(self._bytes(shard, start, size), self.name(index))

    def name(self, index: int) -> str:
        return f"{self.shards[self.index[index, 0]]}, pair at byte {self.index[index, 1]}"

    def _bytes(self, shard: int, start: int, size: int) -> bytes:
        with self.shards[shard].open("rb") as file:
            file.seek(start)
            return file.read(size)

    def _text(self, content: bytes, is_json: bool, where: str) -> str:
        try:
            text = content.decode("utf-8")
            value = json.loads(text).get(self.caption_field) if is_json else text
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{where}: its caption cannot be read ({error})") from error
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: its caption is missing or empty")
        return value.strip()

    def _index(self) -> np.ndarray:
        """``(M, 6)`` int64, see ``_INDEX_COLUMNS``; every caption is looked at."""
        values = array("q")
        bar = tqdm(self.shards, desc="reading shards", unit="shard", delay=2)
        for shard, path in enumerate(bar):
            for name, files in _samples(path):
                where = f"{path}, sample '{name}'"
                picture = next((files[one] for one in _PICTURES if one in files), None)
                kind = next((one for one in _CAPTIONS if one in files), None)
                if picture is None or kind is None:
                    lacking = "picture" if picture is None else "caption"
                    raise InputError(f"{where}: has no {lacking}, only {', '.join(files)}")
                is_json = kind == "json"
                self._text(self._bytes(shard, *files[kind]), is_json, where)
                values.extend([shard, *picture, *files[kind], is_json])
        return np.frombuffer(values, np.int64).reshape(-1, _INDEX_COLUMNS)


def find_shards(path: Path) -> list[Path]:
    """The tar files that a path stands for, in the order of their names."""
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
    else:
        shards = sorted(Path(one) for one in glob.glob(str(path)))
    if not shards:
        raise InputError(f"{path}: there are no tar shards")
    return shards


def shard_key(shards: list[Path], *more: str) -> str:
    """Changes with the shards' names, sizes and times."""
    stats = [(str(one.absolute()), one.stat().st_size, one.stat().st_mtime_ns) for one in shards]
    return hashlib.sha256(json.dumps([stats, more]).encode()).hexdigest()[:20]


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Each sample's name, and where its files begin and how long they are, by their ending."""
    size = path.stat().st_size
    current: str | None = None
    files: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as shard:  # of a compressed one, no pair is found by itself
            for member in shard:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not member.isfile() or not stem:
                    continue
                if member.offset_data + member.size > size:
                    raise InputError(f"{path}: is cut short in '{member.name}'")
                if (name := f"{folder}/{stem}") != current:
                    if current is not None:
                        yield current.lstrip("/"), files
                    current, files = name, {}
                files[ending.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: not an uncompressed tar file ({reason})") from error
    if current is not None:
        yield current.lstrip("/"), files


class DatasetsSource:
    """A data set of Hugging Face ``datasets``: saved to disk, Parquet files, or a name on the hub.

    Args:
        path: A folder of ``save_to_disk``, a folder with Parquet files, or a name.
        data: Names the split and the columns.
    """

    def __init__(self, path: Path, data: ImageTextData) -> None:
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                "data from 'datasets' needs it installed: pip install 'mllm-moe[data]'"
            ) from error
        name = str(data.path)
        try:
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(name)
            elif path.is_dir() and any(path.glob("**/*.parquet")):
                files = sorted(str(one) for one in path.glob("**/*.parquet"))
                loaded = datasets.load_dataset("parquet", data_files=files, split="train")
            else:
                loaded = datasets.load_dataset(name, split=data.dataset_split)
            if isinstance(loaded, dict):
                loaded = loaded[data.dataset_split]
        except Exception as error:  # the library raises whatever it stumbles over
            raise InputError(f"{name}: no data set can be loaded ({error})") from error
        self.path = name
        self.columns = (data.image_field, data.caption_field)
        for column in self.columns:
            if column not in loaded.column_names:
                known = ", ".join(loaded.column_names)
                raise InputError(f"{name}: has no column '{column}', only {known}")
        rows = loaded.select_columns(list(self.columns))
        if data.num_pairs is not None:
            rows = rows.select(range(min(data.num_pairs, len(rows))))
        # As bytes, to be opened as any other stranger's picture.
        self.rows = rows.cast_column(data.image_field, datasets.Image(decode=False))
        self.captions = rows.select_columns([data.caption_field])
        self._check_captions()

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int) -> str:
        text: str = self.captions[index][self.columns[1]]
        return text

    def image(self, index: int) -> Image.Image:
        value = self.rows[index][self.columns[0]]
        if value and value.get("bytes"):
            return open_bytes(value["bytes"], self.name(index))
        if value and value.get("path"):
            return open_image(value["path"])
        raise InputError(f"{self.name(index)}: has no picture")

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def _check_captions(self, chunk: int = 10_000) -> None:
        starts = range(0, len(self), chunk)
        for start in tqdm(starts, desc="reading captions", unit="chunk", delay=2):
            texts = self.captions[start : start + chunk][self.columns[1]]
            for number, text in enumerate(texts, start=start):
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f"{self.name(number)}: its caption is missing or empty")


def open_bytes(content: bytes, where: str) -> Image.Image:
    """:func:`vision_moe.open_image` of bytes that lie in a container."""
    try:
        return open_image(io.BytesIO(content))
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('the image: ')}") from error
