"""Batches of pairs, step by step: from clusters or at random, in shares for several processes.

M pairs, W processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from train.pairs import Pairs
from vision_moe import CLIPMoEModel, ClusterBatchSampler, InputError

_NUM_BATCHES_TO_FILL_FROM = 8
_NUM_DRAWS = 1000


class PairBatches(Dataset[dict[str, Tensor]]):
    """Every batch of a run, in shares: item ``i`` is share ``i % W`` of batch ``i // W``.

    The Trainer deals items to its W processes in turn, so that each step's shares are of one batch.
    The next of a process's shares is read while it computes. Where a picture cannot be read,
    another pair, drawn at random, takes its place.

    Args:
        pairs: What the batches are made of.
        batches: Pair numbers of every batch.
        model: Whose text tower says which padding may be cut.
        num_shares: W; the batches' sizes are multiples of it.
    """

    def __init__(
        self,
        pairs: Pairs,
        batches: Sequence[np.ndarray],
        model: CLIPMoEModel,
        num_shares: int = 1,
    ) -> None:
        self.pairs = pairs
        self.batches = batches
        self.trim_tokens = model.trim_tokens
        self.num_shares = num_shares
        self.reader = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __len__(self) -> int:
        return len(self.batches) * self.num_shares

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ahead = self.ahead
        item = ahead[1] if ahead and ahead[0] == index else self.reader.submit(self._load, index)
        following = index + self.num_shares
        self.ahead = None
        if following < len(self):
            self.ahead = following, self.reader.submit(self._load, following)
        return item.result()

    def _load(self, index: int) -> dict[str, Tensor]:
        number, share = divmod(index, self.num_shares)
        batch = self.batches[number].astype(np.int64)  # a copy
        size = len(batch) // self.num_shares
        mine = slice(share * size, (share + 1) * size)
        pixel_values, readable = self.pairs.read(batch[mine])
        for row in (~readable).nonzero().flatten().tolist():
            batch[mine][row], pixel_values[row] = self._substitute(batch, int(batch[mine][row]))
        # Cut as the whole batch is: the balance loss counts tokens.
        tokens = self.trim_tokens(self.pairs.tokens(batch))[mine]
        numbers = torch.from_numpy(batch[mine])
        return {"pixel_values": pixel_values, "input_ids": tokens, "numbers": numbers}

    def _substitute(self, batch: np.ndarray, unreadable: int) -> tuple[int, Tensor]:
        """A pair that is not in the batch, and its pixels."""
        rng = np.random.default_rng(unreadable)
        for other in rng.integers(len(self.pairs), size=_NUM_DRAWS).tolist():
            if other not in self.pairs.skipped and other not in batch:
                pixel_values, readable = self.pairs.read(np.array([other]))
                if readable[0]:
                    return other, pixel_values[0]
        raise InputError(
            f"{self.pairs.skipped[unreadable]}; no other pair was found that can take its place"
        )


class EpochBatches(Sequence[np.ndarray]):
    """The batches of ``steps`` steps, epoch after epoch; one epoch's plan is held at a time.

    Args:
        plan: An epoch's batches, by its number; as many in every epoch.
        per_epoch: How many.
        steps: Length of the run.
    """

    def __init__(
        self, plan: Callable[[int], Sequence[np.ndarray]], per_epoch: int, steps: int
    ) -> None:
        self.plan = plan
        self.per_epoch = per_epoch
        self.steps = steps
        self.held: tuple[int, Sequence[np.ndarray]] | None = None

    def __len__(self) -> int:
        return self.steps

    @overload
    def __getitem__(self, step: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, step: slice) -> list[np.ndarray]: ...

    def __getitem__(self, step: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(self.steps))]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        epoch, number = divmod(step, self.per_epoch)
        if self.held is None or self.held[0] != epoch:
            self.held = (epoch, self.plan(epoch))
        return self.held[1][number]


def random_batches(
    num_pairs: int,
    batch_size: int,
    steps: int,
    seed: int,
    left_out: np.ndarray | None = None,
    back_off: np.ndarray | None = None,
) -> EpochBatches:
    """``steps`` whole batches from one shuffled epoch after another.

    Args:
        num_pairs: M.
        batch_size: Pairs in a batch, if there are as many.
        steps: How many batches.
        seed: Of the shuffles.
        left_out: Numbers of pairs that take no part; none by default.
        back_off: Numbers of those among them that fill up the batches, anew each time, where all
            others are fewer than a batch.
    """
    usable = np.arange(num_pairs, dtype=np.int32 if num_pairs < 2**31 else np.int64)
    if left_out is not None:
        usable = np.setdiff1d(usable, left_out)
    size = min(batch_size, len(usable))
    per_epoch = len(usable) // size
    missing = 0 if back_off is None else min(batch_size - size, len(back_off))

    def plan(epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([seed, epoch])
        batches = np.split(rng.permutation(usable)[: per_epoch * size], per_epoch)
        if missing and back_off is not None:
            filling = [rng.choice(back_off, missing, replace=False) for _ in batches]
            return [np.concatenate(both) for both in zip(batches, filling, strict=True)]
        return batches

    return EpochBatches(plan, per_epoch, steps)


def cluster_batches(sampler: ClusterBatchSampler, steps: int) -> EpochBatches:
    """``steps`` batches from one epoch of the sampler after another.

    Each epoch's last batch, where it is cut short, is filled up with other pairs of the epoch: no
    pair is left out, and every step weighs the same.
    """

    def plan(epoch: int) -> list[np.ndarray]:
        sampler.set_epoch(epoch)
        *whole, last = sampler.batches()
        missing = sampler.batch_size - len(last)
        if missing and whole:
            rng = np.random.default_rng([sampler.seed, epoch, 1])
            others = np.concatenate(whole[-_NUM_BATCHES_TO_FILL_FROM:])
            last = np.concatenate([last, rng.choice(others, missing, replace=False)])
        return [*whole, last]

    return EpochBatches(plan, len(sampler), steps)
