"""Batches drawn from one accumulated cluster each (CLIP-MoE, arXiv 2409.19291, section 3.1).

A cluster seldom fills whole batches.  What is left over backs off to the cluster's prefix (the
coarser cluster of the stage before), is pooled there with its siblings' leftovers, and so on up to
the whole data set: no pair is lost, and every batch is as pure as its members allow.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class ClusterBatchSampler(Sampler[list[int]]):
    """Yield lists of ``batch_size`` pair indices, each list from one accumulated cluster.

    The order depends on ``seed`` and the epoch alone, so processes that split each batch between
    them see disjoint shares of the same cluster.

    Args:
        labels: ``(M, S)`` stage labels, coarse to fine (see :mod:`vision_moe.clustering`).
        batch_size: Pairs in a (global) batch.  An epoch's last batch may be smaller.
        seed: Of the shuffles.
        global_share: Share of the pairs that skip the clusters and form ordinary random batches.
            Batches from clusters alone let go of what separates the clusters.
    """

    def __init__(
        self, labels: np.ndarray, batch_size: int, seed: int = 0, global_share: float = 0.0
    ) -> None:
        if batch_size < 2:
            raise ValueError(f"a contrastive batch needs at least 2 pairs, not {batch_size}")
        if not 0.0 <= global_share <= 1.0:
            raise ValueError(f"global_share must lie in [0, 1], not {global_share}")
        # Column d numbers the prefixes of length d + 1, so that a sort by it groups the prefix.
        self.prefixes = [
            np.unique(labels[:, : depth + 1], axis=0, return_inverse=True)[1].ravel()
            for depth in range(labels.shape[1])
        ]
        self.num_pairs = len(labels)
        self.batch_size = batch_size
        self.seed = seed
        self.global_share = global_share
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order :meth:`__iter__` gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_pairs // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches():
            yield batch.tolist()

    def batches(self) -> list[np.ndarray]:
        """The epoch's batches in order."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.num_pairs)
        num_global = round(self.global_share * self.num_pairs)
        global_pairs, remaining = order[:num_global], order[num_global:]
        batches: list[np.ndarray] = []
        for prefix in reversed(self.prefixes):
            full, remaining = self._fill(rng.permutation(remaining), prefix)
            batches += full
        rest = rng.permutation(np.concatenate([remaining, global_pairs]))
        cuts = range(self.batch_size, len(rest), self.batch_size)
        tail = [part for part in np.split(rest, cuts) if len(part)]
        short = tail.pop() if tail and len(tail[-1]) < self.batch_size else None
        batches += tail
        batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches if short is None else [*batches, short]

    def _fill(
        self, pairs: np.ndarray, prefix: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Cut ``pairs``, grouped by ``prefix``, into whole batches; give these and what is left."""
        grouped = pairs[np.argsort(prefix[pairs], kind="stable")]
        starts = np.flatnonzero(np.diff(prefix[grouped], prepend=-1))
        batches, leftovers = [], []
        for group in np.split(grouped, starts[1:]):
            whole = len(group) // self.batch_size * self.batch_size
            batches += np.split(group[:whole], whole // self.batch_size) if whole else []
            leftovers.append(group[whole:])
        return batches, np.concatenate(leftovers) if leftovers else pairs[:0]
