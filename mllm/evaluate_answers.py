"""Answers as they are given, kept on disk, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from mllm.generation import Answer, Request

_PATTERN = "answers-*.partial.jsonl"


class AnswerLog:
    """The unfinished evaluation of a folder.

    Each process appends to a file of its own; all are read. A file begins with what its answers
    depend on; one that began with something else is not read, and replaced.

    Args:
        folder: Of the evaluation.
        depends_on: JSON-able: model, prompt, preprocessing, whatever changes an answer.
    """

    def __init__(self, folder: Path, depends_on: Any) -> None:
        self._folder = folder
        text = json.dumps(depends_on, sort_keys=True)
        self._header = json.dumps({"depends_on": hashlib.sha256(text.encode()).hexdigest()})

    def read(self) -> dict[Request, Answer]:
        """What has been answered; a line that was cut off is no answer."""
        answers: dict[Request, Answer] = {}
        for path in sorted(self._folder.glob(_PATTERN)):
            with suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8") as file:
                if next(file, "").strip() != self._header:
                    continue
                for line in file:
                    with suppress(ValueError, TypeError):
                        image, question, choices, text, finished = json.loads(line)
                        request = Request(image, question, tuple(choices))
                        answers[request] = Answer(text, finished)
        return answers

    @contextmanager
    def append(self, process: int) -> Iterator[_Writer]:
        """A process's file, open at its end."""
        path = self._folder / f"answers-{process}.partial.jsonl"
        goes_on = False
        with suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8") as file:
            goes_on = next(file, "").strip() == self._header
        with path.open("a" if goes_on else "w", encoding="utf-8") as file:
            # The new line closes one that was cut off.
            file.write("\n" if goes_on else self._header + "\n")
            yield _Writer(file)

    def remove(self) -> None:
        """The evaluation is done."""
        for path in self._folder.glob(_PATTERN):
            path.unlink(missing_ok=True)


class _Writer:
    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, request: Request, answer: Answer) -> None:
        """Faults are not kept: the next run tries again."""
        if answer.fault is None:
            line = [request.image_key, request.question, request.choices, answer.text,
                    answer.finished]  # fmt: skip
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
