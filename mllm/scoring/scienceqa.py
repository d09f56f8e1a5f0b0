"""ScienceQA: multiple choice, with and without an image (Lu et al., arXiv 2209.09513)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from mllm.scoring.checks import input_error, require_same_length, require_text

_LETTERS = "ABCDE"
_LETTER_AND_TEXT = re.compile(rf"([{_LETTERS}])\. ")
_SENTENCE = re.compile(r"The answer is ([A-Z])\.")


def scienceqa_option(text: str, num_choices: int) -> str | None:
    """The letter that the text chooses, or ``None``, which is wrong.

    The text is a letter from A to E and nothing else, or begins with it as in ``B. the rock``, or
    holds ``The answer is B.`` exactly once. A letter beyond the choices is ``None`` as well.

    Args:
        text: The model's answer.
        num_choices: How many choices this question has.

    Raises:
        InputError: ``num_choices`` is not from 1 to 26.
        TypeError: ``text`` is not a string.
    """
    require_text(text, "an answer")
    if not 1 <= num_choices <= len(string.ascii_uppercase):
        raise input_error(f"a question with {num_choices} choices: there must be from 1 to 26")
    letter = _letter(text)
    return letter if letter in tuple(string.ascii_uppercase[:num_choices]) else None


def scienceqa_accuracy(correct: Sequence[bool], has_image: Sequence[bool]) -> dict[str, float]:
    """``accuracy`` over all questions and ``accuracy_image`` over those with an image.

    The second is left out where no question has one.

    Args:
        correct: Of every question of the split; one without an answer is wrong.
        has_image: Of the same questions.

    Raises:
        InputError: Nothing to score, or unequal lengths.
    """
    require_same_length(correct=correct, has_image=has_image)
    with_image = [hit for hit, image in zip(correct, has_image, strict=True) if image]
    accuracy = {"accuracy": sum(map(bool, correct)) / len(correct)}
    if with_image:
        accuracy["accuracy_image"] = sum(map(bool, with_image)) / len(with_image)
    return accuracy


def _letter(text: str) -> str | None:
    if text in tuple(_LETTERS):
        return text
    if start := _LETTER_AND_TEXT.match(text):
        return start[1]
    sentences: list[str] = _SENTENCE.findall(text)
    return sentences[0] if len(sentences) == 1 else None
