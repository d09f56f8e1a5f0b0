"""Pictures with one caption or several, in the files in which retrieval sets are distributed.

Read by what a file holds, not by its name:

- COCO's ``captions_*.json``: ``{"images": [{"id", "file_name"}], "annotations": [{"image_id",
  "caption"}]}``
- Karpathy's ``dataset_coco.json``, ``dataset_flickr30k.json``: ``{"images": [{"filename",
  "filepath", "split", "sentences": [{"raw"}]}]}``
- Flickr30k as a table: Kaggle's ``image_name| comment_number| comment``; one whose ``raw`` column
  holds a JSON list and which has a ``filename``; the original ``name.jpg#0<TAB>caption``
- ours: JSONL or CSV with ``image`` and ``caption``, one line a caption; or, in JSONL, a list as
  ``captions``
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_moe.errors import InputError

ALL = "all"
_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "comment", "raw", "text")

#: Of one caption: the picture's path, the caption, and the split if the file has any.
_Row = tuple[str, str, str | None]


@dataclass(frozen=True)
class CaptionSet:
    """Pictures and their captions.

    Attributes:
        images: Paths of the pictures.
        captions: Of all pictures.
        image_of_caption: The number of each caption's picture.
        splits: What the file has, with the number of its pictures.
    """

    images: list[Path]
    captions: list[str]
    image_of_caption: list[int]
    splits: dict[str, int]


def read_caption_set(
    path: Path, image_folder: Path | None = None, split: str | None = None
) -> CaptionSet:
    """Read a retrieval set.

    Args:
        path: The file that lists captions.
        image_folder: Where its pictures' paths start; the file's own folder by default.
        split: ``test``, ``val``, ``train``, or ``all`` for the whole set; by default ``test`` where
            the file has splits.  What Karpathy calls ``restval`` belongs to ``train``.

    Raises:
        InputError: The file is missing, damaged or of no known kind, or has no such split.
    """
    root = image_folder or path.parent
    numbers: dict[str, int] = {}
    split_of: dict[str, str | None] = {}
    rows: list[_Row] = []
    for image, caption, part in _rows(path):
        name = Path(image)
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{path}: the picture '{image}' lies outside the image folder")
        rows.append((image, caption, part))
        split_of.setdefault(image, part)
    splits: dict[str, int] = {}
    for part in split_of.values():
        if part is not None:
            splits[part] = splits.get(part, 0) + 1
    chosen = split or ("test" if splits else ALL)
    if chosen != ALL and chosen not in splits:
        known = ", ".join(sorted(splits)) or "no splits"
        raise InputError(f"{path}: has no split '{chosen}', it has {known}; 'all' takes every one")
    captions, image_of_caption = [], []
    for image, caption, part in rows:
        if chosen in (ALL, part):
            captions.append(caption)
            image_of_caption.append(numbers.setdefault(image, len(numbers)))
    if not captions:
        raise InputError(f"{path}: holds no captions")
    return CaptionSet([root / image for image in numbers], captions, image_of_caption, splits)


def _rows(path: Path) -> Iterator[_Row]:
    try:
        # utf-8-sig: spreadsheets begin their CSV with a byte-order mark.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from error
    if not text.lstrip().startswith("{"):
        return _table(text, path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(text, path)
    if "annotations" in content:
        return _coco(content, path)
    return _karpathy(content, path) if "images" in content else _json_lines(text, path)


def _coco(content: dict[str, Any], path: Path) -> Iterator[_Row]:
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not COCO's captions, 'images' is no list of them") from error
    for number, one in enumerate(_list(content, "annotations", path), start=1):
        where = f"{path}, annotation {number}"
        image = _field(one, "image_id", where, (int, str))
        if image not in names:
            raise InputError(f"{where}: there is no image with the id {image!r}")
        yield str(names[image]), _caption(one.get("caption"), where), None


def _karpathy(content: dict[str, Any], path: Path) -> Iterator[_Row]:
    for number, one in enumerate(_list(content, "images", path), start=1):
        where = f"{path}, image {number}"
        folder = one.get("filepath", "") if isinstance(one, dict) else ""
        image = str(Path(str(folder)) / _field(one, "filename", where, (str,)))
        part = one.get("split")
        for sentence in _list(one, "sentences", where):
            caption = _caption(_field(sentence, "raw", where, (str,)), where)
            yield image, caption, "train" if part == "restval" else part


def _json_lines(text: str, path: Path) -> Iterator[_Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        image = _field(record, "image", where, (str,))
        captions = record.get("captions", [record.get("caption")])
        for caption in captions if isinstance(captions, list) else [captions]:
            yield image, _caption(caption, where), record.get("split")


def _table(text: str, path: Path) -> Iterator[_Row]:
    lines = text.splitlines()
    head = lines[0] if lines else ""
    if "\t" in head and "#" in head.split("\t")[0]:
        return _tokens(lines, path)
    separator = max("|\t,", key=head.count)
    # Kaggle's file separates by "| ", and does not quote.
    quoting = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
    return _csv(text.splitlines(keepends=True), separator, quoting, path)


def _csv(lines: Iterable[str], separator: str, quoting: Any, path: Path) -> Iterator[_Row]:
    limit = csv.field_size_limit()
    reader = csv.reader(lines, delimiter=separator, quoting=quoting)
    number = 0
    try:
        header = [name.strip() for name in next(reader, [])]
        image = next((header.index(one) for one in _IMAGE_COLUMNS if one in header), None)
        caption = next((header.index(one) for one in _CAPTION_COLUMNS if one in header), None)
        if image is None or caption is None:
            raise InputError(
                f"{path}: is no list of captions: not COCO's JSON, not Karpathy's, and no table"
                " with the columns image and caption"
            )
        part = header.index("split") if "split" in header else None
        for number, row in enumerate(reader, start=1):
            if not row:
                continue
            where = f"{path}, record {number}"
            if len(row) <= max(image, caption):
                raise InputError(f"{where}: has {len(row)} columns, not {len(header)}")
            name, text = row[image].strip(), row[caption].strip()
            texts = json.loads(text) if header[caption] == "raw" else [text]
            for one in texts:
                yield name, _caption(one, where), row[part].strip() if part is not None else None
    except csv.Error as error:
        reason = f"a field of more than {limit} characters" if "limit" in str(error) else error
        raise InputError(f"{path}, record {number + 1}: not a table ({reason})") from error
    except ValueError as error:
        raise InputError(f"{path}, record {number}: 'raw' is no JSON list ({error})") from error


def _tokens(lines: Iterable[str], path: Path) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        name, tab, caption = line.partition("\t")
        if line.strip():
            where = f"{path}, line {number}"
            if not tab or "#" not in name:
                raise InputError(f"{where}: not 'picture#number<TAB>caption'")
            yield name.rpartition("#")[0], _caption(caption.strip(), where), None


def _list(record: Any, key: str, where: object) -> list[Any]:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, list):
        raise InputError(f"{where}: '{key}' is no list")
    return value


def _field(record: Any, key: str, where: str, kinds: tuple[type, ...]) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kinds) or value == "":
        raise InputError(f"{where}: '{key}' is missing or empty")
    return value


def _caption(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: a caption is missing or empty")
    return value.strip()
