"""MME: yes-or-no questions, two for each image (Fu et al., arXiv 2306.13394)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mllm.scoring.checks import input_error, require_same_length, require_text

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
    by_category: dict[str, dict[str, list[bool]]] = {}
    for category, image, hit in zip(categories, images, correct, strict=True):
        if category not in MME_PERCEPTION + MME_COGNITION:
            known = ", ".join(MME_PERCEPTION + MME_COGNITION)
            raise input_error(f"MME has no category '{category}', only {known}")
        by_category.setdefault(category, {}).setdefault(image, []).append(bool(hit))
    scores = {name: _category_score(name, pairs) for name, pairs in by_category.items()}
    sums = {"perception": MME_PERCEPTION, "cognition": MME_COGNITION}
    return scores | {
        name: sum(scores[part] for part in parts if part in scores)
        for name, parts in sums.items()
        if not scores.keys().isdisjoint(parts)
    }


def _category_score(category: str, hits_by_image: dict[str, list[bool]]) -> float:
    for image, hits in hits_by_image.items():
        if len(hits) != _QUESTIONS_PER_IMAGE:
            raise input_error(
                f"MME category '{category}', image '{image}': {len(hits)} answered questions, "
                f"not {_QUESTIONS_PER_IMAGE}"
            )
    num_images = len(hits_by_image)
    num_right = sum(sum(hits) for hits in hits_by_image.values())
    num_both_right = sum(all(hits) for hits in hits_by_image.values())
    return 100 * num_right / (_QUESTIONS_PER_IMAGE * num_images) + 100 * num_both_right / num_images
