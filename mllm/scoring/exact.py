"""Exact match of short answers."""

from __future__ import annotations


def normalize_answer(text: str) -> str:
    """Lower case, single spaces, no final punctuation: ``" Dark  red."`` -> ``"dark red"``."""
    return " ".join(text.lower().split()).rstrip(".!?, ")


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both say the same after :func:`normalize_answer`."""
    return normalize_answer(prediction) == normalize_answer(answer)
