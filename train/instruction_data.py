"""Instruction samples as token rows in which all questions of a picture share its tokens.

    system, user header, <image> x N | question 1, answer 1 | question 2, answer 2 | ...
    prefix                           | branch 1             | branch 2             |

A branch attends to the prefix and to itself, and its positions go on from the prefix: the row
computes what one sequence for each question would, and the prefix only once.

B rows, L padded length, P length of the prefix, M labelled tokens of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mllm.prompts import ChatPrompts, clean_text

PREFIX, PADDING = 0, -1


@dataclass(frozen=True)
class InstructionSample:
    """A picture with questions and answers.

    Attributes:
        image_key: Number of the picture.
        turns: ``(question, answer)`` pairs.
        is_dialogue: Each turn follows on the ones before; otherwise they are independent.
    """

    image_key: int
    turns: tuple[tuple[str, str], ...]
    is_dialogue: bool = False


@dataclass(frozen=True)
class Row:
    """One picture's tokens.

    Attributes:
        image_key: Number of the picture.
        input_ids: ``(L,)``.
        position_ids: ``(L,)``, restarting after the prefix.
        branch_ids: ``(L,)``, 0 for the prefix, 1, 2, ... for its branches.
        label_positions: ``(M,)``: where a label is predicted, one before the labelled token. The
            end of the prefix may predict the first token of several branches.
        labels: ``(M,)`` token ids.
    """

    image_key: int
    input_ids: np.ndarray
    position_ids: np.ndarray
    branch_ids: np.ndarray
    label_positions: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


# Token ids of a branch, each with whether it is learnt.
Branch = list[tuple[list[int], bool]]


def chat_row(sample: InstructionSample, prompts: ChatPrompts) -> Row:
    """The language model's own chat format; answers and their end-of-turn tokens are learnt."""
    branches: list[Branch] = []
    for number, (question, answer) in enumerate(sample.turns):
        answer_part = (prompts.answer_ids(answer), True)
        if sample.is_dialogue and number > 0:
            branches[0] += [(prompts.follow_up_ids(question), False), answer_part]
        else:
            branches.append([(prompts.question_ids(question), False), answer_part])
    return _row(sample.image_key, prompts.prefix_ids, branches)


def plain_row(
    sample: InstructionSample,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    num_image_tokens: int,
) -> Row:
    """LLaVA's ``plain`` format: picture, answer, newline; questions are discarded."""
    branches: list[Branch] = [
        [(tokenizer.encode(clean_text(answer) + "\n", add_special_tokens=False), True)]
        for _, answer in sample.turns
    ]
    # [bos] where the tokenizer opens texts with one, else nothing.
    prefix = tokenizer.encode("") + [image_token_id] * num_image_tokens
    return _row(sample.image_key, prefix, branches)


def _row(image_key: int, prefix: Sequence[int], branches: Sequence[Branch]) -> Row:
    input_ids = list(prefix)
    position_ids = list(range(len(prefix)))
    branch_ids = [PREFIX] * len(prefix)
    label_positions: list[int] = []
    labels: list[int] = []
    for branch_id, branch in enumerate(branches, start=1):
        previous = len(prefix) - 1  # what stands before the branch's first token
        position = len(prefix)
        for ids, is_learnt in branch:
            for token in ids:
                if is_learnt:
                    label_positions.append(previous)
                    labels.append(token)
                previous = len(input_ids)
                input_ids.append(token)
                position_ids.append(position)
                branch_ids.append(branch_id)
                position += 1
    arrays = (input_ids, position_ids, branch_ids, label_positions, labels)
    return Row(image_key, *(np.asarray(values, dtype=np.int64) for values in arrays))


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


def collate(rows: Sequence[Row], features: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows to the longest.

    Args:
        rows: B of them.
        features: ``(images, N, V)`` features of every picture, by ``image_key``.
        pad_token_id: Any id; padding is neither seen nor learnt.

    Returns:
        ``input_ids``, ``position_ids``, ``branch_ids`` ``(B, L)``; ``label_positions`` ``(M,)``,
        counted through the flattened ``(B * L)``; ``labels`` ``(M,)``; ``image_features``
        ``(B, N, V)``.
    """
    length = max(len(row) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        out = np.full((len(rows), length), value, dtype=np.int64)
        for line, row in zip(out, rows, strict=True):
            line[: len(row)] = getattr(row, name)
        return torch.from_numpy(out)

    label_positions = [number * length + row.label_positions for number, row in enumerate(rows)]
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "position_ids": padded("position_ids", 0),
        "branch_ids": padded("branch_ids", PADDING),
        "label_positions": torch.from_numpy(np.concatenate(label_positions)),
        "labels": torch.from_numpy(np.concatenate([row.labels for row in rows])),
        "image_features": torch.from_numpy(np.stack([features[row.image_key] for row in rows])),
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


def plan_batches(
    lengths: Sequence[int], batch_rows: int, max_tokens: int, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Endless ``(epoch, row numbers of a batch)``, the same for a seed whatever is resumed."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        for batch in plan_epoch(lengths, batch_rows, max_tokens, rng):
            yield epoch, batch
        epoch += 1


class BatchDataset(Dataset[dict[str, Tensor]]):
    """Item ``i`` is the whole ``i``-th batch of the run, so that a step's number is its place."""

    def __init__(
        self,
        rows: Sequence[Row],
        batches: Sequence[Sequence[int]],
        features: np.ndarray,
        pad_token_id: int,
    ) -> None:
        self.rows = rows
        self.batches = batches
        self.features = features
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = [self.rows[number] for number in self.batches[index]]
        return collate(rows, self.features, self.pad_token_id)


def only_item(items: Sequence[Any]) -> Any:
    """Collator for a dataset whose items are batches already."""
    (item,) = items
    return item
