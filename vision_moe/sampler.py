"""Batches drawn from one accumulated cluster each (CLIP-MoE, arXiv 2409.19291, section 3.1).

A cluster seldom fills whole batches.  What is left over backs off to the cluster's prefix (the
coarser cluster of the stage before), is pooled there with its siblings' leftovers, and so on up to
the whole data set: no pair is lost, and every batch is as pure as its members allow.

What upcycling takes of 10^8 pairs, on paper (D = 768, three stages, batches of 800):

============================  =====================================================================
features of one stage         2 D bytes a pair and modality: 307 GB of disk, as memory-mapped
                              shards; gone once the stage's labels are made; before the first
                              stage those of 16,384 pairs
captions, for the labels      to tokenise one of 10 words takes 35 µs, one of 150 words 216 µs, and
of the first stage            all else little: 1 to 6 hours of a core, shared by the processes; a
                              byte a pair
clustering                    centers from a sample of 16,384 rows or more, then one pass over each
                              modality in pieces of 65,536 rows: half an hour on one core, by
                              200,000 rows that took 2.3 seconds, and the reading; 0.5 GB of memory,
                              and a byte a pair for each column of labels that is put together
labels                        one byte a pair and stage: 0.3 GB of disk, memory-mapped
this sampler                  4 bytes a pair for its cluster, 4 for the epoch's plan and 8 while it
                              is made: 1.6 GB at most, and a minute, a process and epoch
batches                       125,000 views of the plan, 15 MB
============================  =====================================================================

``tests/vision_moe/test_scale.py`` holds the sampler to its line at 10^7 pairs.

M pairs, S stages, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_CHUNK = 1 << 20


class ClusterBatchSampler(Sampler[list[int]]):
    """Yield lists of pair indices, each list from one accumulated cluster.

    The order depends on ``seed`` and the epoch alone: every process computes the same batches of
    ``batch_size`` pairs and yields its share of each, so that shares are disjoint and of the same
    cluster.

    Args:
        labels: ``(M, S)`` stage labels, coarse to fine (see :mod:`vision_moe.clustering`).  Pairs
            with a negative label take no part.
        batch_size: Pairs in a (global) batch.  An epoch's last batch may be smaller.
        seed: Of the shuffles.
        global_share: Share of the pairs that skip the clusters and form ordinary random batches.
            Batches from clusters alone let go of what separates the clusters.
        rank: This process.
        world_size: Processes that share each batch.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        seed: int = 0,
        global_share: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 2:
            raise ValueError(f"a contrastive batch needs at least 2 pairs, not {batch_size}")
        if not 0.0 <= global_share <= 1.0:
            raise ValueError(f"global_share must lie in [0, 1], not {global_share}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes: the first is 0")
        if batch_size % world_size:
            raise ValueError(
                f"a batch of {batch_size} pairs cannot be shared evenly by {world_size} processes"
            )
        self.cluster, parents = _number_clusters(labels, batch_size)
        self.ancestors = _ancestors(parents)
        self.num_pairs = int(np.count_nonzero(self.cluster >= 0))
        self.batch_size = batch_size
        self.seed = seed
        self.global_share = global_share
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch whose order :meth:`__iter__` gives, and with which batch it begins:
        a run that was broken off goes on where it was."""
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches of an epoch, the same for every epoch."""
        return -(-self.num_pairs // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches()[self.start_batch :]:
            yield np.array_split(batch, self.world_size)[self.rank].tolist()

    def batches(self) -> list[np.ndarray]:
        """The epoch's (global) batches in order."""
        rng = np.random.default_rng([self.seed, self.epoch])
        dtype = np.int32 if len(self.cluster) < 2**31 else np.int64
        order = np.flatnonzero(self.cluster >= 0).astype(dtype)
        rng.shuffle(order)
        num_global = round(self.global_share * self.num_pairs)
        global_pairs, remaining = order[:num_global], order[num_global:]
        batches: list[np.ndarray] = []
        for ancestor in reversed(self.ancestors):
            full, remaining = self._fill(remaining, ancestor)
            rng.shuffle(remaining)
            batches += full
        rest = np.concatenate([remaining, global_pairs])
        rng.shuffle(rest)
        cuts = range(self.batch_size, len(rest), self.batch_size)
        tail = [part for part in np.split(rest, cuts) if len(part)]
        short = tail.pop() if tail and len(tail[-1]) < self.batch_size else None
        batches += tail
        batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches if short is None else [*batches, short]

    def _fill(
        self, pairs: np.ndarray, ancestor: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Cut ``pairs``, grouped by the ancestors of their clusters, into whole batches; give these
        and what is left."""
        grouped, counts = _group(pairs, self.cluster, ancestor)
        batches: list[np.ndarray] = []
        leftovers = [grouped[: counts[0]]]  # of clusters that are too small to fill a batch
        start = int(counts[0])
        for count in counts[1:].tolist():
            end = start + count
            whole = end - count % self.batch_size
            cuts = range(start, whole, self.batch_size)
            batches += [grouped[cut : cut + self.batch_size] for cut in cuts]
            leftovers.append(grouped[whole:end])
            start = end
        return batches, np.concatenate(leftovers)


def _number_clusters(labels: np.ndarray, batch_size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Number the accumulated clusters of every depth that can fill a batch.

    Smaller ones are never batches, so they need no number; and clusters that have one are at most
    ``S * M / B``.

    Returns:
        ``(M,)`` int32: each pair's deepest such cluster, 0 for the whole data set, -1 for pairs
        that take no part; and for each depth the parents of its clusters, which are numbered in
        order, depth by depth.
    """
    cluster = np.zeros(len(labels), np.int32)
    for part in _chunks(len(labels)):
        cluster[part] = -(labels[part] < 0).any(axis=1).astype(np.int32)
    parents: list[np.ndarray] = []
    first, num_clusters = 0, 1  # the clusters of the depth before are those from `first` on
    for column in labels.T:
        width = int(column.max(initial=0)) + 1
        sizes = np.zeros((num_clusters - first) * width + 1, np.int64)
        for part in _chunks(len(labels)):
            sizes += np.bincount(
                _child(cluster[part], column[part], first, width), minlength=len(sizes)
            )
        large = 1 + np.flatnonzero(sizes[1:] >= batch_size)
        number = np.full(len(sizes), -1, np.int32)
        number[large] = num_clusters + np.arange(len(large))
        for part in _chunks(len(labels)):
            child = number[_child(cluster[part], column[part], first, width)]
            cluster[part] = np.where(child >= 0, child, cluster[part])
        parents.append(first + (large - 1) // width)
        first, num_clusters = num_clusters, num_clusters + len(large)
    return cluster, parents


def _child(cluster: np.ndarray, label: np.ndarray, first: int, width: int) -> np.ndarray:
    """A number from 1 on for each pair's child cluster; 0 if its own is of no such depth."""
    parent = cluster.astype(np.int64) - first
    return np.where(parent >= 0, parent * width + label + 1, 0)


def _ancestors(parents: list[np.ndarray]) -> list[np.ndarray]:
    """For each depth a table from a cluster's number to its ancestor there, counted from 1; 0 where
    the cluster is a coarser one."""
    bounds = np.cumsum([1, *(len(one) for one in parents)])
    tables = []
    for depth, of_depth in enumerate(parents):
        table = np.zeros(bounds[-1], np.int64)
        table[bounds[depth] : bounds[depth + 1]] = 1 + np.arange(len(of_depth))
        for deeper in range(depth + 1, len(parents)):
            table[bounds[deeper] : bounds[deeper + 1]] = table[parents[deeper]]
        tables.append(table)
    return tables


def _group(
    pairs: np.ndarray, cluster: np.ndarray, ancestor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sort ``pairs`` by ``ancestor[cluster[pair]]``, stably, and count each.

    In pieces, since a sort of all would take 16 bytes a pair.
    """
    num_groups = int(ancestor.max(initial=0)) + 1
    counts = np.zeros(num_groups, np.int64)
    for part in _chunks(len(pairs)):
        counts += np.bincount(ancestor[cluster[pairs[part]]], minlength=num_groups)
    grouped = np.empty_like(pairs)
    start = np.cumsum(counts) - counts
    for part in _chunks(len(pairs)):
        key = ancestor[cluster[pairs[part]]]
        order = key.argsort(kind="stable")
        here = np.bincount(key, minlength=num_groups)
        offset = start - (np.cumsum(here) - here)
        grouped[offset[key[order]] + np.arange(len(order))] = pairs[part][order]
        start += here
    return grouped, counts


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, length, _CHUNK))
