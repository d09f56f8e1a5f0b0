"""Records of annotation files, of any format in which benchmarks are distributed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vision_moe import InputError

_ABSENT = (None, "", "nan")  # an empty cell of a table, as pandas writes it too


class Record:
    """One record, which names itself when something is wrong with it.

    Args:
        values: As read.
        where: ``file, record 3``.
    """

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: not an object with named fields")
        self.values: Mapping[str, Any] = values
        self.where = where

    def get(self, *keys: str) -> Any:
        """Value of the first of these fields that is there, else ``None``."""
        for key in keys:
            value = self.values.get(key)
            # Not "in": a list compares with each.
            if not (value is None or (isinstance(value, str) and value in _ABSENT)):
                return value
        return None

    def text(self, *keys: str, default: str | None = None) -> str:
        """A field as text; a number is written out.

        Raises:
            InputError: It is missing and has no default, or is neither text nor a number.
        """
        value = self.get(*keys)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        wrong = "is missing" if value is None else f"is {value!r:.60}, not a text"
        raise InputError(f"{self.where}: the field '{keys[0]}' {wrong}")

    def number(self, key: str) -> int:
        """A field as a whole number."""
        text = self.text(key)
        try:
            return int(text)
        except ValueError:
            raise InputError(
                f"{self.where}: the field '{key}' is {text!r:.60}, not a whole number"
            ) from None

    def texts(self, *keys: str) -> tuple[str, ...]:
        """Several texts: a list of them, a list of ``{"answer": text}``, or one text alone.

        Raises:
            InputError: The field is something else; a missing one is no text.
        """
        value = self.get(*keys)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{self.where}: the field '{keys[0]}' is not a list of texts")
        texts = [one.get("answer") if isinstance(one, Mapping) else one for one in value]
        known = [text for text in texts if isinstance(text, str)]
        if len(known) < len(texts):
            raise InputError(f"{self.where}: the field '{keys[0]}' is not a list of texts")
        return tuple(known)

    def records(self, key: str) -> list[Record]:
        """A field that holds records itself."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise InputError(f"{self.where}: the field '{key}' is not a list of records")
        return [Record(one, f"{self.where}, {key} {number}") for number, one in enumerate(value)]


def read_records(path: Path) -> list[Record]:
    """All records of a JSON list, a JSONL, TSV or CSV file.

    Raises:
        InputError: The file cannot be read; the sentence names the record.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows: Iterator[object] = _json_lines(path)
    elif suffix in (".tsv", ".csv"):
        rows = _table(path, "\t" if suffix == ".tsv" else ",")
    else:
        value = read_json(path)
        # POPE's files are named .json and hold one object a line, which read_json allows for.
        if not isinstance(value, list):
            raise InputError(f"{path}: not a list of records")
        rows = iter(value)
    return [Record(row, f"{path}, record {number}") for number, row in enumerate(rows)]


def read_json(path: Path) -> Any:
    """A JSON file; several objects on lines of their own become a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return list(_json_lines(path))
        raise InputError(f"{path}: not JSON ({error})") from error


def _json_lines(path: Path) -> Iterator[object]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, path, number)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _parse_line(line: str, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not JSON ({error})") from error


def _table(path: Path, delimiter: str) -> Iterator[object]:
    # MMBench keeps its pictures in a column. The limit is the whole process's: it is put back.
    limit = csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter=delimiter)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    finally:
        csv.field_size_limit(limit)
