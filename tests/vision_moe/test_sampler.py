"""Cluster batches: nothing lost, nothing twice, and as pure as the clusters allow."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_moe import ClusterBatchSampler


class Sampler(ClusterBatchSampler):
    """One that remembers what it was made of."""

    def __init__(self, labels: np.ndarray, *arguments: Any) -> None:
        super().__init__(labels, *arguments)
        self.labels = labels


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    num_pairs, num_stages = draw(st.integers(1, 80)), draw(st.integers(1, 3))
    seed, num_labels = draw(st.integers(0, 99)), draw(st.integers(1, 4))
    labels = np.random.default_rng(seed).integers(num_labels, size=(num_pairs, num_stages))
    batch_size = draw(st.integers(2, 12))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    sampler = Sampler(labels, batch_size, seed, share)
    sampler.set_epoch(draw(st.integers(0, 3)))
    return sampler


@settings(deadline=None)
@given(samplers())
def test_every_pair_comes_exactly_once(sampler: ClusterBatchSampler) -> None:
    assert sorted(i for batch in sampler for i in batch) == list(range(sampler.num_pairs))


@settings(deadline=None)
@given(samplers())
def test_all_batches_but_the_last_are_full(sampler: ClusterBatchSampler) -> None:
    sizes = [len(batch) for batch in sampler]
    assert set(sizes[:-1]) <= {sampler.batch_size} and 0 < sizes[-1] <= sampler.batch_size


@settings(deadline=None)
@given(samplers())
def test_length_is_the_number_of_batches(sampler: ClusterBatchSampler) -> None:
    assert len(sampler) == len(list(sampler))


@settings(deadline=None)
@given(samplers())
def test_order_depends_on_seed_and_epoch_alone(sampler: ClusterBatchSampler) -> None:
    assert list(sampler) == list(sampler)


@settings(deadline=None)
@given(samplers())
def test_each_depth_fills_as_many_batches_as_its_leftovers_allow(
    sampler: Sampler,
) -> None:
    """Whole batches of the finest clusters first, then of their prefixes, by plain counting."""
    if sampler.global_share:
        return
    size = sampler.batch_size
    rows = [tuple(row) for row in sampler.labels.tolist()]
    left, expected = Counter(rows), 0
    for depth in range(sampler.labels.shape[1], 0, -1):
        pooled = Counter[tuple[int, ...]]()
        for row, number in left.items():
            pooled[row[:depth]] += number
        expected += sum(number // size for number in pooled.values())
        left = Counter({row: number % size for row, number in pooled.items()})
    pure = sum(
        len({rows[i][0] for i in batch}) == 1 for batch in sampler if len(batch) == size
    )
    assert pure >= expected


def labels_of(*rows: tuple[tuple[int, ...], int]) -> np.ndarray:
    return np.array([row for row, number in rows for _ in range(number)])


def purity(labels: np.ndarray, batch: list[int]) -> int:
    """How many leading columns all members of a batch share."""
    depth = 0
    while depth < labels.shape[1] and len(np.unique(labels[batch, : depth + 1], axis=0)) == 1:
        depth += 1
    return depth


def purities(labels: np.ndarray, batch_size: int, seed: int = 0) -> list[int]:
    return sorted(purity(labels, b) for b in ClusterBatchSampler(labels, batch_size, seed))


def test_batches_are_pure_where_clusters_suffice() -> None:
    labels = labels_of(((0, 0), 8), ((0, 1), 4), ((1, 0), 12))
    assert purities(labels, 4) == [2] * 6


def test_leftovers_meet_their_siblings_first() -> None:
    # 5 + 3 pairs below 0, 6 + 2 below 1: one pure batch each, then one of each prefix.
    labels = labels_of(((0, 0), 5), ((0, 1), 3), ((1, 0), 6), ((1, 1), 2))
    assert purities(labels, 4) == [1, 1, 2, 2]


def test_what_no_prefix_holds_is_pooled_over_all() -> None:
    labels = labels_of(((0, 0), 2), ((1, 0), 2))
    assert purities(labels, 4) == [0]


def test_labels_of_another_parent_are_another_cluster() -> None:
    # Both have the second label 0; only the whole row is a cluster.
    labels = labels_of(((0, 0), 4), ((1, 0), 4))
    assert purities(labels, 4) == [2, 2]


def test_epochs_differ() -> None:
    sampler = ClusterBatchSampler(np.zeros((40, 1), dtype=int), 4)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_seeds_differ() -> None:
    labels = np.zeros((40, 1), dtype=int)
    assert list(ClusterBatchSampler(labels, 4, seed=0)) != list(ClusterBatchSampler(labels, 4, 1))


def test_global_share_mixes_that_share_of_the_batches() -> None:
    labels = np.arange(1000)[:, None] // 100
    batches = ClusterBatchSampler(labels, 10, global_share=0.3).batches()
    mixed = sum(purity(labels, batch.tolist()) == 0 for batch in batches)
    assert 30 <= mixed <= 40  # 30 and what the clusters' rests make


def test_global_share_of_one_ignores_the_clusters() -> None:
    labels = np.arange(400)[:, None] // 100
    batches = ClusterBatchSampler(labels, 10, global_share=1.0)
    assert not any(purity(labels, batch) for batch in batches)


def test_global_share_of_none_mixes_nothing() -> None:
    labels = np.arange(400)[:, None] // 100
    assert all(purity(labels, batch) for batch in ClusterBatchSampler(labels, 10))


def test_batches_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pairs, not 1"):
        ClusterBatchSampler(np.zeros((4, 1), dtype=int), 1)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_impossible_global_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="global_share"):
        ClusterBatchSampler(np.zeros((4, 1), dtype=int), 2, global_share=share)


# --- several processes, and going on -------------------------------------------------------------


def test_shares_of_the_processes_make_the_batch() -> None:
    labels = np.arange(90)[:, None] // 30
    whole = list(ClusterBatchSampler(labels, 12, seed=3))
    shares = [list(ClusterBatchSampler(labels, 12, 3, 0.0, rank, 3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [i for part in parts for i in part] == batch


def test_uneven_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="10 pairs cannot be shared evenly by 4 processes"):
        ClusterBatchSampler(np.zeros((40, 1), dtype=int), 10, world_size=4)


def test_rank_beyond_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2 processes"):
        ClusterBatchSampler(np.zeros((40, 1), dtype=int), 10, rank=2, world_size=2)


def test_broken_epoch_goes_on_where_it_was() -> None:
    labels = np.arange(100)[:, None] // 30
    sampler = ClusterBatchSampler(labels, 8)
    sampler.set_epoch(2)
    whole = list(sampler)
    again = ClusterBatchSampler(labels, 8)
    again.set_epoch(2, start_batch=5)
    assert list(again) == whole[5:]


def test_pairs_with_a_negative_label_take_no_part() -> None:
    labels = np.arange(60)[:, None] // 20
    labels[::7] = -1
    sampler = ClusterBatchSampler(labels, 8)
    expected = np.flatnonzero(labels[:, 0] >= 0).tolist()
    assert sorted(i for batch in sampler for i in batch) == expected
    assert len(sampler) == len(list(sampler))
