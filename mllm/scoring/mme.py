"""MME: yes-or-no questions, two for each image (Fu et al., arXiv 2306.13394)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mllm.scoring.checks import input_error, require_same_length, require_text
from mllm.scoring.statistics import Interval, bootstrap_means, percentile_interval

MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_QUESTIONS_PER_IMAGE = 2
_SUMS = {"perception": MME_PERCEPTION, "cognition": MME_COGNITION}


def mme_answer(text: str) -> Literal["yes", "no"] | None:
    """What the text begins with: ``yes``, else ``no``, within four characters; ``None`` if neither.

    ``None`` is a wrong answer whatever the truth is.

    Raises:
        TypeError: ``text`` is not a string.
    """
    require_text(text, "an answer")
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    if "no" in start:
        return "no"
    return None


def mme_scores(
    categories: Sequence[str], images: Sequence[str], correct: Sequence[bool]
) -> dict[str, float]:
    """Each category's score, and their sums as ``perception`` and ``cognition``.

    A category scores 100 times the share of right answers plus 100 times the share of images of
    which both answers are right: 200 at most, so that perception ends at 2000 and cognition at
    800. A sum is over the categories that are there, and is left out where none is.

    Args:
        categories: Of each question.
        images: Of each question; the same name in two categories is two images.
        correct: Whether :func:`mme_answer` gave the truth.

    Raises:
        InputError: Nothing to score, unequal lengths, an unknown category, or an image that has
            not two questions.
    """
    require_same_length(categories=categories, images=images, correct=correct)
    pairs = _pairs(categories, images, correct)
    scores = {name: sum(points) / len(points) for name, points in pairs.items()}
    return scores | {
        name: sum(scores[part] for part in parts if part in scores)
        for name, parts in _SUMS.items()
        if not scores.keys().isdisjoint(parts)
    }


def mme_intervals(
    categories: Sequence[str],
    images: Sequence[str],
    correct: Sequence[bool],
    seed: int,
    num_resamples: int = 10_000,
) -> dict[str, Interval]:
    """95 % bootstrap intervals of :func:`mme_scores`; images are drawn within their category.

    Args:
        categories: Of each question.
        images: Of each question.
        correct: Of each question.
        seed: Of the resampling.
        num_resamples: How many.

    Raises:
        InputError: As :func:`mme_scores`.
    """
    require_same_length(categories=categories, images=images, correct=correct)
    rng = np.random.default_rng(seed)
    draws = {
        name: bootstrap_means(points, rng, num_resamples)
        for name, points in _pairs(categories, images, correct).items()
    }
    sums = {
        name: sum(draws[part] for part in parts if part in draws)
        for name, parts in _SUMS.items()
        if not draws.keys().isdisjoint(parts)
    }
    return {name: percentile_interval(np.asarray(each)) for name, each in (draws | sums).items()}


def _pairs(
    categories: Sequence[str], images: Sequence[str], correct: Sequence[bool]
) -> dict[str, list[float]]:
    """Points of each image by category; a category's score is their mean."""
    hits: dict[str, dict[str, list[bool]]] = {}
    for category, image, hit in zip(categories, images, correct, strict=True):
        if category not in MME_PERCEPTION + MME_COGNITION:
            known = ", ".join(MME_PERCEPTION + MME_COGNITION)
            raise input_error(f"MME has no category '{category}', only {known}")
        hits.setdefault(category, {}).setdefault(image, []).append(bool(hit))
    return {
        category: [_image_points(category, image, pair) for image, pair in by_image.items()]
        for category, by_image in hits.items()
    }


def _image_points(category: str, image: str, hits: list[bool]) -> float:
    if len(hits) != _QUESTIONS_PER_IMAGE:
        raise input_error(
            f"MME category '{category}', image '{image}': {len(hits)} answered questions, "
            f"not {_QUESTIONS_PER_IMAGE}"
        )
    return 100 * sum(hits) / _QUESTIONS_PER_IMAGE + 100 * all(hits)
