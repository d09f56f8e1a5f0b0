"""Token rows in batches: their mask, their padding, and an epoch of them.

B rows, L padded length, I pictures and M labelled tokens of a batch, N tokens of a picture, V width
of the tower.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from train.instruction_rows import PREFIX, Row
from train.pictures import Pictures

PADDING = -1


def shared_prefix_mask(branch_ids: Tensor) -> Tensor:
    """Which token sees which.

    Args:
        branch_ids: ``(B, L)``, 0 prefix, 1, 2, ... branches, -1 padding.

    Returns:
        ``(B, 1, L, L)`` bool, true where the query (third) sees the key (fourth). transformers
        passes a 4-D mask on as it is, and scaled_dot_product_attention takes it so. Padding sees
        padding: a row of the mask without a true would give NaN.
    """
    length = branch_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch_ids.device).tril()
    query, key = branch_ids[:, :, None], branch_ids[:, None, :]
    sees = (key == query) | ((key == PREFIX) & (query != PADDING))
    return (sees & causal)[:, None]


def collate(rows: Sequence[Row], pictures: Pictures, pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows to the longest.

    Args:
        rows: B of them.
        pictures: What the model reads of the pictures, by their numbers.
        pad_token_id: Any id; padding is neither seen nor learnt.

    Returns:
        ``input_ids``, ``position_ids``, ``branch_ids`` ``(B, L)``; ``row_lengths`` ``(B,)``;
        ``token_places`` ``(T,)``, all but padding, and ``label_positions`` ``(M,)``, counted
        through the flattened ``(B * L)``; ``labels`` ``(M,)``; ``read_tokens``, those that have a
        label to predict, each once, counted through the ``T``; what ``pictures`` gives, in the
        order of the pictures' tokens: I of them, 0 where all rows are text.
    """
    length = max(len(row) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        out = np.full((len(rows), length), value, dtype=np.int64)
        for line, row in zip(out, rows, strict=True):
            line[: len(row)] = getattr(row, name)
        return torch.from_numpy(out)

    keys = [key for row in rows for key in row.image_keys]
    token_places = [number * length + np.arange(len(row)) for number, row in enumerate(rows)]
    label_positions = [number * length + row.label_positions for number, row in enumerate(rows)]
    starts = np.cumsum([0, *(len(row) for row in rows)])
    read = [s + row.label_positions for s, row in zip(starts, rows, strict=False)]
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "position_ids": padded("position_ids", 0),
        "branch_ids": padded("branch_ids", PADDING),
        "token_places": torch.from_numpy(np.concatenate(token_places)),
        "row_lengths": torch.tensor([len(row) for row in rows]),
        "label_positions": torch.from_numpy(np.concatenate(label_positions)),
        "labels": torch.from_numpy(np.concatenate([row.labels for row in rows])),
        "read_tokens": torch.from_numpy(np.unique(np.concatenate(read))),
        **pictures(keys),
    }


def plan_epoch(
    lengths: Sequence[int], batch_rows: int, max_tokens: int, rng: np.random.Generator
) -> list[list[int]]:
    """Cut shuffled rows into batches of similar length, in random order.

    Rows are sorted within chunks of 16 batches only, so that batches differ between epochs.

    Args:
        lengths: Of the rows.
        batch_rows: Most rows of a batch.
        max_tokens: Most tokens of a batch, padding included; a longer row is a batch of its own.
        rng: Decides the order.

    Returns:
        Row numbers of each batch; every row occurs once.
    """
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), 16 * batch_rows):
        chunk = sorted(order[start : start + 16 * batch_rows], key=lambda row: -lengths[row])
        batch: list[int] = []
        for row in chunk:
            # Longest first: the batch's first row is what the others are padded to.
            if batch and (
                len(batch) == batch_rows or (len(batch) + 1) * lengths[batch[0]] > max_tokens
            ):
                batches.append(batch)
                batch = []
            batch.append(int(row))
        batches.append(batch)
    return [batches[index] for index in rng.permutation(len(batches))]


class BatchDataset(Dataset[dict[str, Tensor]]):
    """Item ``i`` is the whole ``i``-th batch of the run, so that a step's number is its place."""

    def __init__(
        self,
        rows: Sequence[Row],
        batches: Sequence[Sequence[int]],
        pictures: Pictures,
        pad_token_id: int,
    ) -> None:
        self.rows = rows
        self.batches = batches
        self.pictures = pictures
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        numbers = self.batches[index]
        if not numbers:
            return self._nothing_to_learn()
        return collate([self.rows[number] for number in numbers], self.pictures, self.pad_token_id)

    def _nothing_to_learn(self) -> dict[str, Tensor]:
        """For a process that is left without a batch in the last step, and must take part."""
        batch = collate([self.rows[0]], self.pictures, self.pad_token_id)
        return {
            **batch,
            "label_positions": batch["label_positions"][:0],
            "labels": batch["labels"][:0],
            "read_tokens": batch["read_tokens"][:0],
        }


def only_item(items: Sequence[Any]) -> Any:
    """Collator for a dataset whose items are batches already."""
    (item,) = items
    return item
