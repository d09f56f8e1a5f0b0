"""Which rows a run sees in which order: drawn by their sources' weights, cut into batches.

All of it follows from the seed, so that a run that is resumed sees what it would have seen.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from train.instruction_data import plan_epoch
from train.row_store import RowStore


class WeightedDraws:
    """The rows of one epoch after another.

    A source of ``n`` rows and weight ``w`` gives ``round(w * n)`` of them to an epoch, one at
    least. They are taken from one shuffle of all its rows after another: none is seen again before
    all others have been, and at a weight of 0.5 the second epoch sees the other half.

    Args:
        sources: Of the rows, which source each is of.
        weights: Of the sources.
        seed: Of the shuffles.
    """

    def __init__(self, sources: Sequence[int], weights: Sequence[float], seed: int) -> None:
        of_rows = np.asarray(sources)
        self.seed = seed
        self.rows = [np.flatnonzero(of_rows == number) for number in range(len(weights))]
        self.counts = [
            max(1, round(weight * len(rows))) if len(rows) else 0
            for weight, rows in zip(weights, self.rows, strict=True)
        ]

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(self.counts)

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Row numbers, ascending; those that are due several times occur several times."""
        return np.concatenate([self._of_source(number, epoch) for number in range(len(self.rows))])

    def _of_source(self, number: int, epoch: int) -> np.ndarray:
        rows, count = self.rows[number], self.counts[number]
        if not count:
            return rows
        first = epoch * count
        shuffles = range(first // len(rows), -(-(first + count) // len(rows)))
        stream = [
            np.random.default_rng([self.seed, number, shuffle, 1]).permutation(rows)
            for shuffle in shuffles
        ]
        start = first - shuffles.start * len(rows)
        return np.sort(np.concatenate(stream)[start : start + count])


def plan_batches(
    rows: RowStore,
    draws: WeightedDraws,
    batch_rows: int,
    max_tokens: int,
    seed: int,
    step_batches: int | None = None,
) -> Iterator[list[int]]:
    """Endless row numbers of one batch after another.

    The first epoch begins with its largest step, and that with its largest batch: memory that does
    not suffice is noticed at once, and on a CPU what the first step frees has room for all others.

    Args:
        rows: Of the run.
        draws: Which of them are an epoch.
        batch_rows: As in :func:`train.instruction_data.plan_epoch`.
        max_tokens: As there.
        seed: Of the order.
        step_batches: Batches of an optimiser step, if those with pictures and those of text alone
            are to be apart; a batch holds one kind then, and so do the steps but where a kind's
            last batches fill none.
    """
    lengths = np.asarray(rows.lengths)
    epoch = num_planned = 0
    while True:
        rng = np.random.default_rng([seed, epoch])

        def batches_of(chosen: np.ndarray, rng: np.random.Generator = rng) -> list[list[int]]:
            plan = plan_epoch(lengths[chosen], batch_rows, max_tokens, rng)
            return [chosen[batch].tolist() for batch in plan]

        drawn = draws.of_epoch(epoch)
        if step_batches is None:
            batches = batches_of(drawn)
        else:
            shown = np.array([rows.has_pictures(row) for row in drawn])
            kinds = [batches_of(drawn[shown]), batches_of(drawn[~shown])]
            batches = _by_steps(kinds, step_batches, -num_planned % step_batches, rng)
        yield from largest_first(batches, lengths, step_batches or 1) if epoch == 0 else batches
        num_planned += len(batches)
        epoch += 1


def largest_first(
    batches: list[list[int]], lengths: np.ndarray, step_batches: int
) -> list[list[int]]:
    """By tokens with padding; two steps change places, and two batches within one."""
    sizes = [len(batch) * int(lengths[batch].max()) for batch in batches]
    largest = int(np.argmax(sizes))
    order = list(range(len(batches)))
    start = largest - largest % step_batches
    if start + step_batches <= len(batches):
        step = order[start : start + step_batches]
        order[start : start + step_batches] = order[:step_batches]
        order[:step_batches] = step
        largest -= start
    order[0], order[largest] = order[largest], order[0]
    return [batches[number] for number in order]


def _by_steps(
    kinds: Sequence[list[list[int]]], step_batches: int, num_open: int, rng: np.random.Generator
) -> list[list[int]]:
    """Batches in whole steps of one kind, in random order.

    What fills no step comes last, but for the first ``num_open``, which end the last step of the
    epoch before.
    """
    steps: list[list[list[int]]] = []
    rest: list[list[int]] = []
    for batches in kinds:
        whole = len(batches) - len(batches) % step_batches
        steps += [batches[at : at + step_batches] for at in range(0, whole, step_batches)]
        rest += batches[whole:]
    steps = [steps[number] for number in rng.permutation(len(steps))]
    while len(rest) < num_open and steps:
        rest += steps.pop()
    return [*rest[:num_open], *(batch for step in steps for batch in step), *rest[num_open:]]
