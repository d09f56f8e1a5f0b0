"""Differences between methods with intervals over test questions and seeds.

S seeds, N questions of one seed, C columns of scores, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mllm.scoring.statistics import percentile_interval

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Claim:
    """A difference in points (a ratio of two differences where its name says so), with its 95 %
    interval.

    Attributes:
        seeds: How many it rests on.
        goal: What the difference should be at least.
        above_zero: The interval should also lie above zero.
    """

    difference: float
    low: float
    high: float
    seeds: int
    goal: float = 0.0
    above_zero: bool = True

    @property
    def reached(self) -> bool:
        """Whether it is what it should be."""
        return self.difference >= self.goal and (self.low > 0 or not self.above_zero)

    def as_json(self) -> dict[str, Any]:
        """As ``evidence.json`` has it."""
        values = {**asdict(self), "reached": self.reached}
        return {name: one if np.isfinite(one) else None for name, one in values.items()}


def difference(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    goal: float = 0.0,
    above_zero: bool = True,
) -> Claim:
    """``mean(ours) - mean(theirs)`` in points.

    Args:
        ours: For each seed the scores ``(N,)``, 0 to 1.
        theirs: On the same questions.
        goal: In points.
        above_zero: See :class:`Claim`.
    """
    gaps = [100 * (a - b)[:, None] for a, b in zip(ours, theirs, strict=True)]
    means = resampled_means(gaps)[:, 0]
    value = float(np.mean([gap.mean() for gap in gaps]))
    return Claim(value, *percentile_interval(means), len(gaps), goal, above_zero)


def share_of_gain(
    part: Sequence[np.ndarray],
    whole: Sequence[np.ndarray],
    base: Sequence[np.ndarray],
    goal: float,
) -> Claim:
    """``(part - base) / (whole - base)`` of the means; scores as for :func:`difference`.

    Where nothing was gained there is no share of it: NaN, and such resamples are left out.
    """
    gains = [
        np.stack([p - b, w - b], axis=1) for p, w, b in zip(part, whole, base, strict=True)
    ]
    means = resampled_means(gains)
    own = np.mean([gain.mean(axis=0) for gain in gains], axis=0)
    gained = means[means[:, 1] > 0]
    if own[1] <= 0 or not len(gained):
        return Claim(np.nan, np.nan, np.nan, len(gains), goal, above_zero=False)
    interval = percentile_interval(gained[:, 0] / gained[:, 1])
    return Claim(float(own[0] / own[1]), *interval, len(gains), goal, above_zero=False)


def resampled_means(scores: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """``(R, C)`` means of S seeds drawn with replacement, and in each draw of its N questions.

    Args:
        scores: For each seed ``(N, C)``; a question's columns are drawn together.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    num_seeds = len(scores)
    drawn = rng.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    total = np.zeros((NUM_RESAMPLES, scores[0].shape[1]))
    for number, one in enumerate(scores):
        # How often each distinct row is drawn is multinomial: the law of drawing one by one.
        rows, counts = np.unique(one, axis=0, return_counts=True)
        for slot in range(num_seeds):
            chosen = np.flatnonzero(drawn[:, slot] == number)
            draws = rng.multinomial(len(one), counts / len(one), size=len(chosen))
            total[chosen] += draws @ rows / len(one)
    return total / num_seeds
