"""Timing that a noisy machine distorts least: variants in turn, ratios within each turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int = 7,
    warmup: int = 1,
    description: str = "",
) -> dict[str, list[float]]:
    """Time every variant once a round, for a number of rounds: A B C, A B C, ...

    The machine's speed drifts; what is compared is therefore measured side by side, and every
    second round runs backwards, so that no variant always follows the same one.

    Args:
        variants: What to call, by label.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        description: Of the progress bar.

    Returns:
        Seconds of every counted round, by label.
    """
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    with tqdm(total=(warmup + repeats) * len(variants), desc=description, unit="run") as bar:
        for turn in range(warmup + repeats):
            labels = list(variants)
            for label in labels if turn % 2 == 0 else reversed(labels):
                _synchronize()
                started = time.perf_counter()
                variants[label]()
                _synchronize()
                took = time.perf_counter() - started
                if turn >= warmup:
                    seconds[label].append(took)
                bar.update()
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
