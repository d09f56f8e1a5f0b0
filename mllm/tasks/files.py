"""Tasks whose questions lie in files: what all of them share.

Three sources, in this order: the benchmark's own files in the folder of ``--data``, Parquet files
there with the columns of the hub's data set, and that data set itself.
"""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mllm.tasks.base import Task, TaskItem
from mllm.tasks.records import Record, read_records
from mllm.tasks.rows import HubDataset, HubRows, ParquetRows, Rows, find_parquet
from vision_moe import InputError, open_image

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

_ROW = "row "


class FileTask(Task):
    """A benchmark that others distribute.

    Attributes:
        title: Its name in sentences.
        needed_files: What belongs into the folder of ``--data``, for a sentence: the file by which
            the benchmark's own format is known, then the rest.
        llava_file: LLaVA's question file, read where the benchmark's own file is not there.
        suffix: What LLaVA appends to each question.
        hub: Where the same lies on the model hub.
        image_folders: Folders below ``--data`` in which pictures are looked for.
        may_lack_pictures: Some questions have none.
    """

    title: ClassVar[str]
    needed_files: ClassVar[tuple[str, ...]]
    llava_file: ClassVar[str | None] = None
    suffix: ClassVar[str] = SHORT_ANSWER
    hub: ClassVar[HubDataset | None] = None
    image_folders: ClassVar[tuple[str, ...]] = ("", "images")
    may_lack_pictures: ClassVar[bool] = False

    def __init__(self, data: str | None = None) -> None:
        super().__init__(data)
        self._rows: Rows | None = None
        self._row_of_image: dict[str, int] = {}

    @abstractmethod
    def read(self) -> Sequence[TaskItem]:
        """The questions in the benchmark's own files."""

    def read_row(self, record: Record) -> TaskItem:
        """The question in a row of the hub's columns.

        ``image_key`` is a name that rows with the same picture share, or ``None``.
        """
        raise InputError(f"{self.title}: Parquet files are not a format that it comes in")

    def find_data(self) -> None:
        if self.data is None:
            self._open_hub()
            return
        folder = Path(self.data)
        if not folder.is_dir():
            raise InputError(f"--data '{folder}' is not a folder; {self._needs(folder)}")
        if self._find(self.needed_files[0]) is None and self._llava_path() is None:
            files = find_parquet(folder, self.hub.split) if self.hub else []
            if not files:
                raise InputError(self._needs(folder))
            self._rows = ParquetRows(files)

    def all_items(self, seed: int) -> Sequence[TaskItem]:
        if self._rows is not None:
            return self._row_items(self._rows)
        path = self._llava_path()
        if path is not None and self._find(self.needed_files[0]) is None:
            return [self.read_llava(record) for record in read_records(path)]
        return self.read()

    def prompt(self, item: TaskItem) -> str:
        question = item.question.rstrip()
        # LLaVA's own question files hold the suffix already.
        return question if question.endswith(self.suffix.strip()) else question + self.suffix

    def open_image(self, image_key: str) -> Image.Image:
        if image_key.startswith(_ROW):
            if self._rows is None:
                self.find_data()
            assert self._rows is not None
            return self._rows.open_image(int(image_key.removeprefix(_ROW)))
        return open_image(self._image_path(image_key))

    def read_llava(self, record: Record) -> TaskItem:
        """A line of LLaVA's question file; the truth is known where the line tells it."""
        answers = record.texts("answers")
        return TaskItem(
            question_id=record.text("question_id"),
            image_key=record.text("image"),
            question=record.text("text", "question"),
            answer=record.text("answer", "label", default=answers[0] if answers else ""),
            category=record.text("category", default=""),
            answers=answers,
        )

    def file(self, name: str, what: str) -> Path:
        """A file of the folder, or of one folder below.

        Raises:
            InputError: It is not there.
        """
        path = self._find(name)
        if path is None:
            raise InputError(
                f"{self.title}: '{name}' ({what}) is missing; it belongs into '{self.data}'"
            )
        return path

    def optional_file(self, name: str) -> Path | None:
        return self._find(name)

    def _find(self, name: str) -> Path | None:
        folder = Path(self.data or "")
        return next(iter([*folder.glob(name), *sorted(folder.glob(f"*/{name}"))]), None)

    def _llava_path(self) -> Path | None:
        return None if self.llava_file is None else self._find(self.llava_file)

    def _image_path(self, image_key: str) -> Path:
        root = Path(self.data or "").absolute()
        for below in self.image_folders:
            path = Path(os.path.normpath(root / below / image_key))
            # A record's path is a stranger's, so it may not leave the folder; a link in it is the
            # user's own.
            if not path.is_relative_to(os.path.normpath(root)):
                raise InputError(f"the picture '{image_key}' lies outside of '{root}'")
            if path.is_file():
                return path
        raise InputError(f"there is no picture '{image_key}' in '{root}'")

    def _row_items(self, rows: Rows) -> list[TaskItem]:
        items = []
        for number, record in enumerate(rows):
            item = self.read_row(record)
            # Rows of one picture each hold a copy of it; by its id they share one.
            name = item.image_key
            key: str | None
            if self.may_lack_pictures and rows.cell(number) is None:
                key = None
            elif name is None:
                key = f"{_ROW}{number}"
            else:
                key = f"{_ROW}{self._row_of_image.setdefault(name, number)}"
            items.append(dataclasses.replace(item, image_key=key))
        return items

    def _open_hub(self) -> None:
        if self.hub is None:
            raise InputError(f"{self.title} needs --data, a folder: {self._needs_files()}")
        try:
            self._rows = HubRows(self.hub)
        except Exception as error:  # datasets and the hub's client raise what they like
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error)
            raise InputError(
                f"{self.title} cannot be had from the hub ({reason}): give its files with --data;"
                f" {self._needs_files()}"
            ) from error

    def _needs(self, folder: Path) -> str:
        return f"{self.title} is not in '{folder}': {self._needs_files()}"

    def _needs_files(self) -> str:
        names = [f"'{name}'" for name in self.needed_files]
        listed = " and ".join([", ".join(names[:-1]), names[-1]]) if names[1:] else names[0]
        return f"{listed} belong{'s' if not names[1:] else ''} into the folder"
