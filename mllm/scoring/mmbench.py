"""MMBench: multiple choice, asked once for each rotation of the options (arXiv 2307.06281)."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from mllm.scoring.checks import input_error, require_same_length, require_text

_DECORATED = ("{}.", "{},", "{}:", "{})", "({})")
_ARTICLE = "A"
_MAX_WORDS_WITH_ARTICLE = 3  # in a longer text "A" is taken for the article
_ROTATION_STEP = 1_000_000  # a rotation's index is the question's plus a multiple of this


def mmbench_option(text: str, options: Mapping[str, str] | Sequence[str]) -> str | None:
    """The letter of the option that the text chooses, or ``None``, which is wrong.

    In this order: the one letter that stands bare among the words ("A" only in a text of up to
    three words); the one written ``B.``, then ``B,`` ``B:`` ``B)`` ``(B)``; the one option whose
    text is part of the answer, whatever the case. Where two fit, none does.

    Args:
        text: The model's answer.
        options: Texts by capital letter, or in order from A. An empty text is never found.

    Raises:
        InputError: There is no option, too many for the alphabet, or a letter is not a capital.
        TypeError: Something is not a string.
    """
    require_text(text, "an answer")
    by_letter = _by_letter(options)
    words = text.split()
    bare = _only([letter for letter in by_letter if letter in words])
    if bare and not (bare == _ARTICLE and len(words) > _MAX_WORDS_WITH_ARTICLE):
        return bare
    for pattern in _DECORATED:
        decorated = _only([letter for letter in by_letter if pattern.format(letter) in words])
        if decorated:
            return decorated
    lower = text.lower()
    return _only(
        [letter for letter, option in by_letter.items() if option and option.lower() in lower]
    )


def mmbench_circular(indices: Sequence[int], correct: Sequence[bool]) -> dict[int, bool]:
    """Whether each question is answered rightly in every one of its rotations.

    Args:
        indices: Of each asked rotation; ``index % 1_000_000`` is its question.
        correct: Whether that rotation was answered rightly.

    Returns:
        By question, in order of appearance. Whether all rotations are there only the caller can
        know: there are as many as the question has options.

    Raises:
        InputError: Nothing to score, unequal lengths, or an index twice.
    """
    require_same_length(indices=indices, correct=correct)
    seen: set[int] = set()
    all_right: dict[int, bool] = {}
    for index, hit in zip(indices, correct, strict=True):
        if index in seen:
            raise input_error(f"MMBench index {index} is answered twice")
        seen.add(index)
        question = index % _ROTATION_STEP
        all_right[question] = all_right.get(question, True) and bool(hit)
    return all_right


def _by_letter(options: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    if isinstance(options, str):
        raise TypeError("the options must be several strings, not one")
    if isinstance(options, Mapping):
        by_letter = dict(options)
    else:
        if len(options) > len(string.ascii_uppercase):
            raise input_error(f"{len(options)} options are more than the alphabet has letters")
        by_letter = dict(zip(string.ascii_uppercase, options, strict=False))
    if not by_letter:
        raise input_error("a multiple-choice question has no options")
    for letter, option in by_letter.items():
        if letter not in tuple(string.ascii_uppercase):
            raise input_error(f"an option is named {letter!r}, not by one capital letter")
        require_text(option, f"option {letter}")
    return by_letter


def _only(letters: list[str]) -> str | None:
    return letters[0] if len(letters) == 1 else None
