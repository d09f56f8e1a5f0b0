"""All rows of a run: kept as pieces of four bytes a token, laid out when they are asked for.

665,000 conversations with a picture of 576 tokens each would take 12 GB as rows; as pieces they
take half a gigabyte.
"""

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from tqdm import tqdm

from train.instruction_rows import Branch, InstructionSample, Pieces, Row, RowLimits, lay_out
from vision_moe import InputError

logger = logging.getLogger(__name__)

MAX_LOST_SHARE = 0.01


class RowStore(Sequence[Row]):
    """Rows by number.

    Args:
        limits: What they are laid out by.

    Attributes:
        lengths: Of the rows, in tokens.
        sources: Of the rows, which of the recipe's sources each is of.
    """

    def __init__(self, limits: RowLimits) -> None:
        self.limits = limits
        self.lengths = array("i")
        self.sources = array("i")
        self._codes = array("i")
        self._starts = array("q", [0])

    def append(self, pieces: Pieces, length: int, source: int = 0) -> None:
        """Add a row that is known to have that length."""
        codes = self._codes
        for numbers in (pieces.image_keys, pieces.prefix):
            codes.append(len(numbers))
            codes.extend(numbers)
        for branch in pieces.branches:
            codes.append(len(branch))
            for ids, is_learnt in branch:
                codes.append(int(is_learnt))
                codes.append(len(ids))
                codes.extend(ids)
        self._starts.append(len(codes))
        self.lengths.append(length)
        self.sources.append(source)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return lay_out(self._pieces(index % len(self)), self.limits)

    def image_keys(self, index: int) -> tuple[int, ...]:
        """Numbers of a row's pictures, with those that the context cuts off."""
        start = self._starts[index]
        return tuple(self._codes[start + 1 : start + 1 + self._codes[start]])

    def has_pictures(self, index: int) -> bool:
        """Whether a row is more than text."""
        return self._codes[self._starts[index]] > 0

    def _pieces(self, index: int) -> Pieces:
        place, end = self._starts[index], self._starts[index + 1]

        def read() -> list[int]:
            nonlocal place
            count = self._codes[place]
            numbers = self._codes[place + 1 : place + 1 + count].tolist()
            place += 1 + count
            return numbers

        image_keys, prefix = read(), read()
        branches: list[Branch] = []
        while place < end:
            num_parts = self._codes[place]
            place += 1
            branch: Branch = []
            for _ in range(num_parts):
                is_learnt = bool(self._codes[place])
                place += 1
                branch.append((read(), is_learnt))
            branches.append(branch)
        return Pieces(tuple(image_keys), prefix, branches)


def collect_rows(
    samples: Sequence[InstructionSample],
    pieces_of: Callable[[InstructionSample], Pieces],
    limits: RowLimits,
) -> RowStore:
    """The rows of all samples that hold a label; logs what the context cut off.

    Args:
        samples: Of a run.
        pieces_of: :func:`train.instruction_rows.chat_pieces` or another, with its options.
        limits: What they are laid out by.

    Raises:
        InputError: More than 1 % of the samples lose all that there is to learn.
    """
    store = RowStore(limits)
    num_cut = num_tokens_cut = 0
    lost: list[str] = []
    bar: Iterator[InstructionSample] = tqdm(samples, desc="tokenising", unit="sample", delay=2)
    for number, sample in enumerate(bar):
        pieces = pieces_of(sample)
        row = lay_out(pieces, limits)
        num_cut += row.num_cut > 0
        num_tokens_cut += row.num_cut
        if len(row.labels):
            store.append(pieces, len(row), sample.source_number)
        else:
            lost.append(sample.source or f"sample {number}")
    if num_cut:
        logger.warning(
            "%s of %s samples are longer than the context: %s tokens cut off",
            *(f"{count:,}" for count in (num_cut, len(samples), num_tokens_cut)),
        )
    if lost:
        fault = (
            f"{len(lost):,} of {len(samples):,} samples have nothing to learn within the context,"
            f" {lost[0]} for one"
        )
        if len(lost) > MAX_LOST_SHARE * len(samples):
            raise InputError(fault)
        logger.warning("%s", fault)
    return store
