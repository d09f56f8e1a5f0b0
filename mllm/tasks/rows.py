"""Tables with pictures in a column: Parquet files of a folder, or a data set of the hub.

Pictures stay in the file until they are asked for.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.tasks.records import Record
from vision_moe import InputError, open_image

IMAGE_COLUMN = "image"


@dataclass(frozen=True)
class HubDataset:
    """Where a benchmark lies on the model hub."""

    path: str
    split: str
    name: str | None = None


class Rows(ABC):
    """Records without their pictures, and the picture of each by its number."""

    @abstractmethod
    def __iter__(self) -> Iterator[Record]: ...

    @abstractmethod
    def cell(self, number: int) -> Any:
        """What the picture column holds."""

    def open_image(self, number: int) -> Image.Image:
        """The RGB picture of a row; the first of several."""
        value = self.cell(number)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise InputError(f"row {number}: the column '{IMAGE_COLUMN}' holds no picture")
        return open_image(io.BytesIO(content))


class ParquetRows(Rows):
    """Rows of Parquet files, in the order of their names."""

    def __init__(self, files: Sequence[Path]) -> None:
        parquet = _library("pyarrow.parquet")
        try:
            self._files = [parquet.ParquetFile(file) for file in files]
        except Exception as error:  # pyarrow raises what a stranger's bytes make it raise
            names = ", ".join(file.name for file in files)
            raise InputError(f"{names}: not Parquet ({error})") from error
        self._names = [file.name for file in files]
        self._open_group: tuple[int, int] | None = None
        self._cells: list[Any] = []

    def __iter__(self) -> Iterator[Record]:
        number = 0
        for name, file in zip(self._names, self._files, strict=True):
            columns = [column for column in file.schema_arrow.names if column != IMAGE_COLUMN]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield Record(row, f"{name}, row {number}")
                    number += 1

    def cell(self, number: int) -> Any:
        for index, file in enumerate(self._files):
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if number < num_rows:
                    return self._group(index, group)[number]
                number -= num_rows
        raise InputError(f"there is no row {number}")

    def _group(self, index: int, group: int) -> list[Any]:
        if self._open_group != (index, group):  # neighbours are asked for in turn
            table = self._files[index].read_row_group(group, columns=[IMAGE_COLUMN])
            self._cells = table.column(IMAGE_COLUMN).to_pylist()
            self._open_group = (index, group)
        return self._cells


class HubRows(Rows):
    """Rows of a data set of the hub, loaded with ``datasets``."""

    def __init__(self, source: HubDataset) -> None:
        datasets = _library("datasets")
        data = datasets.load_dataset(source.path, source.name, split=source.split)
        self._texts = data.remove_columns(IMAGE_COLUMN)
        # Undecoded: a damaged picture is found when it is opened, and told by its question.
        self._pictures = data.select_columns(IMAGE_COLUMN).with_format("arrow")
        self._where = f"{source.path}, {source.split}"

    def __iter__(self) -> Iterator[Record]:
        for number, row in enumerate(self._texts):
            yield Record(row, f"{self._where}, row {number}")

    def cell(self, number: int) -> Any:
        return self._pictures[number].column(IMAGE_COLUMN).to_pylist()[0]


def find_parquet(folder: Path, split: str) -> list[Path]:
    """The folder's Parquet files: those named for the split, where any of them is.

    Raises:
        InputError: None is named for it, and there are several splits.
    """
    files = sorted(folder.rglob("*.parquet"))
    named = [file for file in files if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", file.stem)]
    splits = {re.split(r"[-.]\d|-of-", file.stem)[0] for file in files}
    if not named and len(splits) > 1:
        raise InputError(
            f"'{folder}' holds Parquet files of {', '.join(sorted(splits))}, none of '{split}'"
        )
    return named or files


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise InputError(
            f"the package {name.partition('.')[0]} is not installed: pip install 'mllm-moe[data]'"
        ) from None
