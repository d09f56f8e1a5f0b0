"""VQA accuracy against several human answers (VQAv2, VizWiz, TextVQA).

The rules are those of the official VQA evaluation (Antol et al., arXiv 1505.00468;
visualqa.org/evaluation.html) and, for TextVQA, of M4C (Hu et al., arXiv 1911.06258).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mllm.scoring.checks import input_error, require_text
from mllm.scoring.contractions import CONTRACTIONS

_PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_FULL_STOP_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = frozenset({"a", "an", "the"})
_REPLACEMENTS = _NUMBERS | CONTRACTIONS
_FULL_MARK = 3  # so many humans with the same answer make it right


def normalize_vqa_answer(text: str) -> str:
    """The text as VQAv2 and VizWiz compare it.

    Punctuation goes, a full stop only where no digit follows; ``none`` to ``ten`` become digits,
    articles are dropped and contractions get their apostrophe back. Not for multiple choice: the
    option "A" is an article and becomes empty.

    Raises:
        TypeError: ``text`` is not a string.
    """
    require_text(text, "an answer")
    return _normalize(text)


def normalize_textvqa_answer(text: str) -> str:
    """The text as TextVQA's evaluator (M4C) compares it.

    As :func:`normalize_vqa_answer`, but lower-cased first, without any ``,`` and ``?``, and with
    ``'s`` as a word of its own.

    Raises:
        TypeError: ``text`` is not a string.
    """
    require_text(text, "an answer")
    return _normalize_textvqa(text)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The share of humans with whom the prediction agrees, where three are as good as all.

    It is the mean of ``min(matches / 3, 1)`` over the subsets that lack one answer each. Of ten
    answers 0, 1, 2, 3 and 4 or more matches give 0, 0.3, 0.6, 0.9 and 1. The same mean is taken
    over however many answers there are; with two or three of them even full agreement is worth
    only 1/3 or 2/3, so a caller should report questions with fewer than ten. One answer alone
    leaves no subset to compare with: it counts as exact match, 0 or 1.

    All texts are normalised, always. (The official script leaves them alone where the humans are
    unanimous, so that "Yes" would miss ten times "yes".)

    Args:
        prediction: May be empty, which matches only what is empty after normalisation.
        answers: The human answers to this question.

    Raises:
        InputError: There is no answer.
        TypeError: Something is not a string, or ``answers`` is one.
    """
    return _accuracy(prediction, answers, _normalize)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """:func:`vqa_accuracy` on texts normalised by :func:`normalize_textvqa_answer`."""
    return _accuracy(prediction, answers, _normalize_textvqa)


def _accuracy(prediction: str, answers: Sequence[str], normalize: Callable[[str], str]) -> float:
    require_text(prediction, "the prediction")
    if isinstance(answers, str):
        raise TypeError("the answers must be a sequence of strings, not one string")
    for answer in answers:
        require_text(answer, "every human answer")
    num_answers = len(answers)
    if num_answers == 0:
        raise input_error("a question has no human answer to compare with")
    target = normalize(prediction)
    # Humans mostly say the same: each wording is normalised once.
    agreeing = {wording for wording in set(answers) if normalize(wording) == target}
    matches = sum(answer in agreeing for answer in answers)
    if num_answers == 1:
        return float(matches)
    # Each match is left out once and then misses itself; each other answer leaves all matches.
    # Whole numbers until the one division: 3 of 10 are 0.9 and not 0.8999.
    without_a_match = matches * min(matches - 1, _FULL_MARK)
    without_another = (num_answers - matches) * min(matches, _FULL_MARK)
    return (without_a_match + without_another) / (_FULL_MARK * num_answers)


def _normalize(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = _strip_punctuation(text).lower().split()
    return " ".join([_REPLACEMENTS.get(word, word) for word in words if word not in _ARTICLES])


def _normalize_textvqa(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _normalize(text)


def _strip_punctuation(text: str) -> str:
    marks = _PUNCTUATION.intersection(text)
    if marks:
        number = "," in marks and _COMMA_BETWEEN_DIGITS.search(text)
        text = text.translate(
            {
                ord(mark): "" if number or f"{mark} " in text or f" {mark}" in text else " "
                for mark in marks
            }
        )
    if "." in text:
        text = _FULL_STOP_BEFORE_NO_DIGIT.sub("", text)
    return text
