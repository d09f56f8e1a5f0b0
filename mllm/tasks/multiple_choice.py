"""Multiple choice: how the options are listed, and how they are chosen."""

from __future__ import annotations

import string
from typing import ClassVar

from mllm.tasks.base import TaskItem
from mllm.tasks.files import FileTask

OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


def list_options(question: str, options: tuple[str, ...]) -> str:
    """The question with a line ``A. text`` for each option."""
    lettered = zip(string.ascii_uppercase, options, strict=False)
    lines = [f"{letter}. {text}" for letter, text in lettered]
    return "\n".join([question, *lines])


class MultipleChoiceTask(FileTask):
    """Questions whose options are listed by letter; the answer is a letter."""

    suffix: ClassVar[str] = OPTION_LETTER

    def choices(self, item: TaskItem) -> tuple[str, ...]:
        return tuple(string.ascii_uppercase[: len(item.options)])
