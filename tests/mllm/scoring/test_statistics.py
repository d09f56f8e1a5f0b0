"""Bootstrap intervals and McNemar's test against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.scoring import (
    bootstrap_interval,
    mcnemar_p_value,
    paired_bootstrap_interval,
    unpaired_bootstrap_interval,
)
from vision_moe import InputError

SCORES = st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), min_size=1, max_size=30)


def test_interval_of_an_accuracy_is_near_the_normal_one() -> None:
    # 600 of 1000: 0.6 +- 1.96 * sqrt(0.24 / 1000) = 0.6 +- 0.0304. The ends were 0.0004 off.
    low, high = bootstrap_interval([True] * 600 + [False] * 400, seed=0)
    assert low == pytest.approx(0.6 - 0.0304, abs=0.002)
    assert high == pytest.approx(0.6 + 0.0304, abs=0.002)


def test_the_law_of_two_scores_is_that_of_drawing_them_one_by_one() -> None:
    # The mean of two draws from {0, 1} is 0, 0.5 or 1 with chances 1/4, 1/2, 1/4, so the middle
    # half ends on 0 and 1 or within, and the middle 40 % are 0.5 alone.
    assert bootstrap_interval([0, 1], seed=0, level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([0, 1], seed=0, level=0.6) == (0, 1)


def test_same_seed_same_interval() -> None:
    scores = list(np.random.default_rng(1).random(50))
    assert bootstrap_interval(scores, seed=3) == bootstrap_interval(scores, seed=3)
    assert bootstrap_interval(scores, seed=3) != bootstrap_interval(scores, seed=4)


def test_resamples_in_several_batches_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = list(np.random.default_rng(1).random(50))
    whole = bootstrap_interval(scores, seed=3, num_resamples=101)
    monkeypatch.setattr("mllm.scoring.statistics._MAX_NUMBERS_AT_ONCE", 500)
    assert bootstrap_interval(scores, seed=3, num_resamples=101) == whole


@settings(deadline=None)
@given(SCORES)
def test_interval_lies_within_the_scores(scores: list[float]) -> None:
    low, high = bootstrap_interval(scores, seed=0, num_resamples=50)
    assert min(scores) - 1e-12 <= low <= high <= max(scores) + 1e-12


def test_a_higher_level_gives_a_wider_interval() -> None:
    scores = [0, 1] * 100
    narrow = bootstrap_interval(scores, seed=0, level=0.5)
    wide = bootstrap_interval(scores, seed=0, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_cancels_what_both_models_share() -> None:
    # b lacks 0.1 everywhere: the difference has no spread, though both scores have.
    a = np.tile([0.2, 0.9], 20)
    low, high = paired_bootstrap_interval(a, a - 0.1, seed=0)
    assert (low, high) == (pytest.approx(0.1), pytest.approx(0.1))
    low, high = unpaired_bootstrap_interval(a, a - 0.1, seed=0)
    assert low < 0 < high


def test_unpaired_interval_is_near_the_normal_one() -> None:
    # 0.6 of 1000 minus 0.5 of 500: 0.1 +- 1.96 * sqrt(0.24 / 1000 + 0.25 / 500) = 0.1 +- 0.0533.
    # The ends were 0.0013 off.
    low, high = unpaired_bootstrap_interval([1] * 600 + [0] * 400, [1, 0] * 250, seed=0)
    assert low == pytest.approx(0.1 - 0.0533, abs=0.003)
    assert high == pytest.approx(0.1 + 0.0533, abs=0.003)


def test_paired_difference_changes_sign_with_the_order() -> None:
    a, b = [1, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 1]
    low, high = paired_bootstrap_interval(a, b, seed=0, num_resamples=50_000)
    other_low, other_high = paired_bootstrap_interval(b, a, seed=1, num_resamples=50_000)
    assert (low, high) == (pytest.approx(-other_high), pytest.approx(-other_low))


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (4, 1, 2 * (1 + 5) / 32),
        (3, 3, 1.0),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_is_the_binomial_test_of_the_disagreements(
    only_a: int, only_b: int, p_value: float
) -> None:
    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    assert mcnemar_p_value(a, b) == pytest.approx(p_value)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_symmetric_and_a_probability(pairs: list[tuple[bool, bool]]) -> None:
    a, b = zip(*pairs, strict=True)
    assert 0 < mcnemar_p_value(a, b) <= 1
    assert mcnemar_p_value(a, b) == pytest.approx(mcnemar_p_value(b, a))


INTERVALS = pytest.mark.parametrize(
    "interval",
    [
        lambda scores, **rest: bootstrap_interval(scores, **{"seed": 0} | rest),
        lambda scores, **rest: paired_bootstrap_interval(scores, scores, **{"seed": 0} | rest),
        lambda scores, **rest: unpaired_bootstrap_interval(scores, scores, **{"seed": 0} | rest),
    ],
    ids=["one", "paired", "unpaired"],
)


@INTERVALS
@pytest.mark.parametrize(
    ("scores", "message"),
    [([], "there are no"), ([1, math.nan], "nan at position 1"), ([math.inf], "inf at position 0"),
     ([[1, 0]], "2 dimensions")],
)  # fmt: skip
def test_scores_without_a_mean_are_refused(interval, scores, message: str) -> None:
    with pytest.raises(InputError, match=message):
        interval(scores)


@INTERVALS
@pytest.mark.parametrize("scores", [["0.5"], [None, 1.0], [1j]])
def test_what_is_no_number_is_refused(interval, scores) -> None:
    with pytest.raises(TypeError, match="must be numbers"):
        interval(scores)


@INTERVALS
@pytest.mark.parametrize(
    ("setting", "message"),
    [({"seed": -1}, "seed is -1"), ({"num_resamples": 0}, "0 resamples"),
     ({"level": 0}, "level is 0"), ({"level": 95}, "level is 95")],
)  # fmt: skip
def test_impossible_settings_are_refused(interval, setting, message: str) -> None:
    with pytest.raises(InputError, match=message):
        interval([0.0, 1.0], **setting)


def test_pairs_need_equal_lengths() -> None:
    with pytest.raises(InputError, match="2 a but 1 b"):
        paired_bootstrap_interval([1, 0], [1], seed=0)
    with pytest.raises(InputError, match="2 a but 1 b"):
        mcnemar_p_value([True, False], [True])


def test_mcnemar_refuses_scores_between_right_and_wrong() -> None:
    with pytest.raises(InputError, match="right or wrong"):
        mcnemar_p_value([0.3, 1.0], [1.0, 1.0])
