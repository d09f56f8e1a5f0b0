"""How sure a score is, and a difference of two scores.

Percentile bootstrap (Efron and Tibshirani 1993, section 13.3) and McNemar's exact test (1947).
N questions, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mllm.scoring.checks import input_error, require_same_length

_MAX_NUMBERS_AT_ONCE = 1 << 22  # 32 MB


class Interval(NamedTuple):
    """Both ends, in the unit of the scores."""

    low: float
    high: float


def bootstrap_interval(
    scores: Sequence[float], seed: int, num_resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of the mean.

    Where all scores are equal, no resample differs and the interval has no width; that says
    little when the questions are few.

    Args:
        scores: ``(N,)``, one a question.
        seed: Of the resampling; the same seed gives the same interval.
        num_resamples: R.
        level: Coverage, between 0 and 1.

    Raises:
        InputError: No scores, one that is not finite, or an impossible seed, R or level.
        TypeError: The scores are not numbers.
    """
    rng = _generator(seed, num_resamples, level)
    return _percentiles(_resampled_means(_as_scores(scores, "scores"), rng, num_resamples), level)


def paired_bootstrap_interval(
    a: Sequence[float],
    b: Sequence[float],
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Interval of ``mean(a) - mean(b)``, both on the same questions in the same order.

    Questions are drawn with both their scores, so what makes a question hard for both cancels.

    Args:
        a: ``(N,)``.
        b: ``(N,)``.
        seed: As in :func:`bootstrap_interval`.
        num_resamples: R.
        level: Coverage.

    Raises:
        InputError: As :func:`bootstrap_interval`, or unequal lengths.
        TypeError: The scores are not numbers.
    """
    rng = _generator(seed, num_resamples, level)
    require_same_length(a=a, b=b)
    differences = _as_scores(a, "scores of a") - _as_scores(b, "scores of b")
    return _percentiles(_resampled_means(differences, rng, num_resamples), level)


def unpaired_bootstrap_interval(
    a: Sequence[float],
    b: Sequence[float],
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Interval of ``mean(a) - mean(b)`` where each was asked questions of its own.

    Args:
        a: ``(N,)``.
        b: Of any length.
        seed: As in :func:`bootstrap_interval`.
        num_resamples: R.
        level: Coverage.

    Raises:
        InputError: As :func:`bootstrap_interval`.
        TypeError: The scores are not numbers.
    """
    rng = _generator(seed, num_resamples, level)
    means_a = _resampled_means(_as_scores(a, "scores of a"), rng, num_resamples)
    means_b = _resampled_means(_as_scores(b, "scores of b"), rng, num_resamples)
    return _percentiles(means_a - means_b, level)


def mcnemar_p_value(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact p-value that two models are right equally often on the same questions.

    Only questions on which one is right and the other wrong tell; under the hypothesis each of
    them falls to either side like a coin. Without any, the value is 1.

    Args:
        a: ``(N,)``, whether the first model is right.
        b: ``(N,)``, the second.

    Raises:
        InputError: No questions, unequal lengths, or scores between right and wrong.
        TypeError: The scores are not numbers.
    """
    # Here, because scipy.stats takes a second to import.
    from scipy.stats import binomtest

    require_same_length(a=a, b=b)
    right_a, right_b = _as_hits(a, "scores of a"), _as_hits(b, "scores of b")
    only_a = int(np.count_nonzero(right_a & ~right_b))
    only_b = int(np.count_nonzero(right_b & ~right_a))
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def bootstrap_means(
    scores: Sequence[float], rng: np.random.Generator, num_resamples: int = 10_000
) -> NDArray[np.float64]:
    """``(R,)`` means of as many resamples, for intervals of what is made of several means."""
    return _resampled_means(_as_scores(scores, "scores"), rng, num_resamples)


def percentile_interval(values: NDArray[np.float64], level: float = 0.95) -> Interval:
    """What the middle ``level`` of ``values`` ``(R,)`` spans."""
    return _percentiles(values, level)


def _generator(seed: int, num_resamples: int, level: float) -> np.random.Generator:
    if seed < 0:
        raise input_error(f"the seed is {seed} and must not be negative")
    if num_resamples < 1:
        raise input_error(f"{num_resamples} resamples: there must be at least 1")
    if not 0 < level < 1:
        raise input_error(f"the level is {level} and must lie between 0 and 1")
    return np.random.default_rng(seed)


def _as_scores(values: Sequence[float], name: str) -> NDArray[np.float64]:
    scores = np.asarray(values)
    if scores.size == 0:
        raise input_error(f"there are no {name}")
    if scores.dtype.kind not in "biuf":
        raise TypeError(f"the {name} must be numbers")
    if scores.ndim != 1:
        raise input_error(f"the {name} have {scores.ndim} dimensions, not one a question")
    scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise input_error(f"the {name} hold {scores[first]} at position {first}")
    return scores


def _as_hits(values: Sequence[bool], name: str) -> NDArray[np.bool_]:
    scores = _as_scores(values, name)
    if not np.isin(scores, (0.0, 1.0)).all():
        raise input_error(
            f"McNemar's test takes right or wrong, but the {name} hold more than both"
        )
    return scores.astype(bool)


def _resampled_means(
    scores: NDArray[np.float64], rng: np.random.Generator, num_resamples: int
) -> NDArray[np.float64]:
    """``(R,)`` means of N scores drawn with replacement."""
    # How often each distinct score is drawn is multinomial: the same law as drawing questions one
    # by one, and for right or wrong it takes two numbers a resample instead of N.
    values, counts = np.unique(scores, return_counts=True)
    at_once = max(1, _MAX_NUMBERS_AT_ONCE // values.size)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        draws = rng.multinomial(scores.size, counts / scores.size, size=size)
        means[start : start + size] = draws @ values / scores.size
    return means


def _percentiles(means: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(low), float(high))
