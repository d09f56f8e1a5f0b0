"""SEED-Bench, multiple choice (Li et al., arXiv 2307.16125), as LLaVA scores it."""

from __future__ import annotations

from mllm.scoring.checks import require_text


def seed_correct(prediction: str, letter: str) -> bool:
    """Whether the prediction is the option's letter and nothing else.

    Raises:
        TypeError: One of both is not a string.
    """
    require_text(prediction, "the prediction")
    require_text(letter, "the letter")
    return prediction == letter
