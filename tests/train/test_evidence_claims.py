"""Differences, shares and the suppression test of ``mllm bench evidence``, by hand."""

import numpy as np
import pytest
import torch

from train.clip_evaluation import held_out_scenes
from train.evidence.claims import difference, share_of_gain
from train.evidence.experts import suppression, within_clusters
from vision_moe import CLIPMoEModel


def test_difference_of_two_methods_by_hand() -> None:
    claim = difference([np.ones(50), np.ones(50)], [np.zeros(50), np.ones(50)], goal=40)
    assert claim.difference == 50
    # Seeds are drawn, too: both draws may be the one or the other.
    assert (claim.low, claim.high) == (0, 100)
    assert not claim.reached


def test_interval_is_that_of_one_seeds_questions() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(400) < 0.7, rng.random(400) < 0.5
    claim = difference([ours.astype(float)], [theirs.astype(float)])
    gap = 100 * (ours.astype(float) - theirs)
    half = 1.96 * gap.std() / 20
    # Measured: within 0.15 points of the normal interval, of a half width of 7.
    assert claim.low == pytest.approx(gap.mean() - half, abs=0.4)
    assert claim.high == pytest.approx(gap.mean() + half, abs=0.4)
    assert claim.reached


def test_share_of_gain_by_hand() -> None:
    base, whole = np.zeros(10), np.ones(10)
    part = np.array([1.0] * 10)
    assert share_of_gain([part], [whole], [base], 0.95).reached
    half = share_of_gain([part / 2], [whole], [base], 0.95)
    assert (half.difference, half.low, half.high, half.reached) == (0.5, 0.5, 0.5, False)


def test_retrieval_within_clusters_by_hand() -> None:
    image = torch.eye(4)
    text = image[[1, 0, 2, 3]]  # the first two captions are exchanged
    together = np.zeros((4, 1), np.int64)
    assert within_clusters(image, text, together).tolist() == [0, 0, 1, 1]
    apart = np.array([[0], [1], [2], [2]])
    assert within_clusters(image, text, apart).tolist() == [1, 1]


def test_suppression_test_of_equal_stages_finds_nothing(clip: CLIPMoEModel) -> None:
    found = suppression([clip] * 4, held_out_scenes(clip, 24, 0), 2, 0)
    assert [one["stage"] for one in found] == [1, 2, 3]
    assert all(one["before"] == one["after"] for one in found if one["num_queries"])


def test_share_of_nothing_is_none() -> None:
    nothing = share_of_gain([np.ones(5)], [np.zeros(5)], [np.zeros(5)], 0.95).as_json()
    assert (nothing["difference"], nothing["low"], nothing["reached"]) == (None, None, False)
