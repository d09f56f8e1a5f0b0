"""POPE: does the model see objects that are not there (Li et al., arXiv 2305.10355).

``yes`` is the positive class. Answers and labels must already belong together: pair them by the
question's id, never by the line of a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mllm.scoring.checks import input_error, require_same_length, require_text
from mllm.scoring.statistics import Interval, percentile_interval

_OUTCOMES = (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"))
_NEGATIVE_WORDS = frozenset({"no", "No", "not"})


def pope_answer(text: str) -> Literal["yes", "no"]:
    """``no`` when the text before its first full stop has the word no, No or not, else ``yes``.

    So an empty text and "NO" are ``yes``; whoever calls this counts the empty ones.

    Raises:
        TypeError: ``text`` is not a string.
    """
    require_text(text, "an answer")
    sentence, _, _ = text.partition(".")
    words = sentence.replace(",", "").split(" ")
    return "yes" if _NEGATIVE_WORDS.isdisjoint(words) else "no"


def pope_metrics(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of ``yes``, as shares of one.

    A share of nothing is 0: precision when no answer is ``yes``, recall when no label is, F1 when
    both are 0.

    Args:
        answers: ``yes`` or ``no``, from :func:`pope_answer`.
        labels: The truth, in the same order.

    Raises:
        InputError: Nothing to score, unequal lengths, or something else than ``yes`` and ``no``.
    """
    require_same_length(answers=answers, labels=labels)
    for name, values in (("answer", answers), ("label", labels)):
        for value in values:
            if value not in ("yes", "no"):
                raise input_error(f"a POPE {name} is {value!r}, neither 'yes' nor 'no'")
    pairs = list(zip(answers, labels, strict=True))
    true_positives = pairs.count(("yes", "yes"))
    false_positives = pairs.count(("yes", "no"))
    false_negatives = pairs.count(("no", "yes"))
    true_negatives = pairs.count(("no", "no"))
    return {
        "accuracy": (true_positives + true_negatives) / len(pairs),
        "precision": _share(true_positives, true_positives + false_positives),
        "recall": _share(true_positives, true_positives + false_negatives),
        "f1": _share(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
        "yes_share": (true_positives + false_positives) / len(pairs),
    }


def pope_scores(
    answers: Sequence[str], labels: Sequence[str], categories: Sequence[str]
) -> dict[str, float]:
    """:func:`pope_metrics` of each category, as ``f1_random`` and so on, and their ``mean_f1``.

    Args:
        answers: ``yes`` or ``no``.
        labels: The truth, in the same order.
        categories: ``random``, ``popular`` or ``adversarial`` of each question.

    Raises:
        InputError: As :func:`pope_metrics`.
    """
    require_same_length(answers=answers, labels=labels, categories=categories)
    by_category: dict[str, tuple[list[str], list[str]]] = {}
    for answer, label, category in zip(answers, labels, categories, strict=True):
        category_answers, category_labels = by_category.setdefault(category, ([], []))
        category_answers.append(answer)
        category_labels.append(label)
    metrics = {name: pope_metrics(*pair) for name, pair in by_category.items()}
    scores = {
        f"{metric}_{category}": value
        for category, of_category in metrics.items()
        for metric, value in of_category.items()
    }
    scores["mean_f1"] = sum(of_category["f1"] for of_category in metrics.values()) / len(metrics)
    return scores


def pope_intervals(
    answers: Sequence[str],
    labels: Sequence[str],
    categories: Sequence[str],
    seed: int,
    num_resamples: int = 10_000,
) -> dict[str, Interval]:
    """95 % bootstrap intervals of all that :func:`pope_metrics` and :func:`pope_scores` tell.

    Questions are drawn within their category.

    Args:
        answers: ``yes`` or ``no``.
        labels: The truth, in the same order.
        categories: Of each question.
        seed: Of the resampling.
        num_resamples: How many.
    """
    require_same_length(answers=answers, labels=labels, categories=categories)
    rng = np.random.default_rng(seed)
    outcomes = Counter(zip(categories, answers, labels, strict=True))
    draws = {}
    for category in dict.fromkeys(categories):
        counts = np.array([outcomes[category, answer, label] for answer, label in _OUTCOMES])
        draws[category] = rng.multinomial(counts.sum(), counts / counts.sum(), size=num_resamples)
    intervals = _percentiles_of(_resampled_metrics(sum(draws.values())), "")
    f1 = []
    for category, counts in draws.items():
        metrics = _resampled_metrics(counts)
        intervals |= _percentiles_of(metrics, f"_{category}")
        f1.append(metrics["f1"])
    return intervals | {"mean_f1": percentile_interval(np.mean(f1, axis=0))}


def _resampled_metrics(counts: Any) -> dict[str, Any]:
    """:func:`pope_metrics` of ``(R, 4)`` counts in the order of ``_OUTCOMES``."""
    true_yes, false_yes, false_no, true_no = counts.T
    return {
        "accuracy": (true_yes + true_no) / counts.sum(1),
        "precision": _shares(true_yes, true_yes + false_yes),
        "recall": _shares(true_yes, true_yes + false_no),
        "f1": _shares(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "yes_share": (true_yes + false_yes) / counts.sum(1),
    }


def _percentiles_of(metrics: dict[str, Any], ending: str) -> dict[str, Interval]:
    return {f"{name}{ending}": percentile_interval(values) for name, values in metrics.items()}


def _shares(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
