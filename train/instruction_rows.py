"""Instruction samples as token rows in which all questions of a picture share its tokens.

    system, user header, <image> x N | question 1, answer 1 | question 2, answer 2 | ...
    prefix                           | branch 1             | branch 2             |

A branch attends to the prefix and to itself, and its positions go on from the prefix: the row
computes what one sequence for each question would, and the prefix only once. Pictures stand in the
prefix, in questions, or nowhere.

L tokens of a row, M labelled ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from mllm.prompts import ChatPrompts, Question, clean_text

PREFIX = 0


@dataclass(frozen=True)
class InstructionSample:
    """Pictures, none to several, with questions and answers.

    Attributes:
        image_keys: Numbers of the pictures, in the order in which they stand. Those that no
            question holds stand before the first question, and all questions share them.
        turns: ``(question, answer)`` pairs. A question that holds pictures is a tuple of texts, a
            picture between each two.
        is_dialogue: Each turn follows on the ones before; otherwise they are independent.
        system: The system message; the chat template's own if it is ``None``.
        source: Where the sample comes from, for messages.
        source_number: Which of the recipe's sources it is of.
    """

    image_keys: tuple[int, ...]
    turns: tuple[tuple[Question, str], ...]
    is_dialogue: bool = False
    system: str | None = None
    source: str = ""
    source_number: int = 0

    @property
    def num_leading_images(self) -> int:
        """Pictures that stand before the first question."""
        return len(self.image_keys) - sum(
            len(question) - 1 for question, _ in self.turns if isinstance(question, tuple)
        )


@dataclass(frozen=True)
class Row:
    """One sample's tokens.

    Attributes:
        image_keys: Numbers of the pictures whose tokens the row holds, in their order.
        input_ids: ``(L,)``.
        position_ids: ``(L,)``, restarting after the prefix.
        branch_ids: ``(L,)``, 0 for the prefix, 1, 2, ... for its branches.
        label_positions: ``(M,)``: where a label is predicted, one before the labelled token. The
            end of the prefix may predict the first token of several branches.
        labels: ``(M,)`` token ids.
        num_cut: Tokens that did not fit into the context.
    """

    image_keys: tuple[int, ...]
    input_ids: np.ndarray
    position_ids: np.ndarray
    branch_ids: np.ndarray
    label_positions: np.ndarray
    labels: np.ndarray
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class RowLimits:
    """What a row needs to know of the model.

    Attributes:
        image_token_id: Id of the placeholder.
        num_image_tokens: Tokens of a picture, by its number.
        max_tokens: Of a prefix with one branch: the language model's context, or less.
    """

    image_token_id: int
    num_image_tokens: Callable[[int], int]
    max_tokens: int | None = None


# Token ids of a branch, each with whether it is learnt; one placeholder for each picture.
Branch = list[tuple[list[int], bool]]


@dataclass(frozen=True)
class Pieces:
    """A row before it is laid out: one placeholder for each picture, nothing cut.

    Attributes:
        image_keys: Numbers of the pictures, in their order.
        prefix: Token ids.
        branches: Behind the prefix, each.
    """

    image_keys: tuple[int, ...]
    prefix: list[int]
    branches: list[Branch]


def chat_pieces(sample: InstructionSample, prompts: ChatPrompts) -> Pieces:
    """The language model's own chat format; answers and their end-of-turn tokens are learnt."""
    num_leading = sample.num_leading_images
    branches: list[Branch] = []
    for number, (question, answer) in enumerate(sample.turns):
        answer_part = (prompts.answer_ids(answer), True)
        if sample.is_dialogue and number > 0:
            branches[0] += [(prompts.follow_up_ids(question), False), answer_part]
        else:
            asked = prompts.question_ids(question, num_leading > 0, sample.system)
            branches.append([(asked, False), answer_part])
    return Pieces(sample.image_keys, prompts.opening_ids(num_leading, sample.system), branches)


def plain_pieces(
    sample: InstructionSample, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> Pieces:
    """LLaVA's ``plain`` format: pictures, answer, newline; questions are discarded."""
    branches: list[Branch] = [
        [(tokenizer.encode(clean_text(answer) + "\n", add_special_tokens=False), True)]
        for _, answer in sample.turns
    ]
    # [bos] where the tokenizer opens texts with one, else nothing.
    prefix = tokenizer.encode("") + [image_token_id] * len(sample.image_keys)
    return Pieces(sample.image_keys, prefix, branches)


def chat_row(sample: InstructionSample, prompts: ChatPrompts, limits: RowLimits) -> Row:
    """:func:`chat_pieces`, laid out."""
    return lay_out(chat_pieces(sample, prompts), limits)


def plain_row(
    sample: InstructionSample, tokenizer: PreTrainedTokenizerBase, limits: RowLimits
) -> Row:
    """:func:`plain_pieces`, laid out."""
    return lay_out(plain_pieces(sample, tokenizer, limits.image_token_id), limits)


def lay_out(pieces: Pieces, limits: RowLimits) -> Row:
    """Lay the pieces end to end, placeholders expanded, and cut what the context cannot hold.

    A picture whose last token would not fit is left out with all that follows it in its branch.
    """
    builder = _RowBuilder(pieces.image_keys, limits)
    fits = builder.extend(pieces.prefix, 0, PREFIX, is_learnt=False)
    num_prefix = len(builder.input_ids)
    for branch_id, branch in enumerate(pieces.branches, start=1):
        builder.previous = num_prefix - 1
        position, branch_fits = num_prefix, fits
        for ids, is_learnt in branch:
            before = len(builder.input_ids)
            if branch_fits:
                branch_fits = builder.extend(ids, position, branch_id, is_learnt)
            else:
                builder.skip(ids)
            position += len(builder.input_ids) - before
    return builder.row()


class _RowBuilder:
    def __init__(self, image_keys: Sequence[int], limits: RowLimits) -> None:
        self.limits = limits
        self.keys: Iterator[int] = iter(image_keys)
        self.kept_keys: list[int] = []
        self.input_ids: list[int] = []
        self.position_ids: list[int] = []
        self.branch_ids: list[int] = []
        self.label_positions: list[int] = []
        self.labels: list[int] = []
        self.num_cut = 0
        self.previous = -1  # place of the token that predicts the next one

    def extend(self, ids: Sequence[int], position: int, branch_id: int, is_learnt: bool) -> bool:
        """Append ``ids`` from ``position`` on; false when not all of them fit."""
        limit = self.limits.max_tokens
        for number, token in enumerate(ids):
            count, key = 1, None
            if token == self.limits.image_token_id:
                key = next(self.keys)
                count = self.limits.num_image_tokens(key)
            if limit is not None and position + count > limit:
                self.num_cut += count
                self.skip(ids[number + 1 :])
                return False
            if key is not None:
                self.kept_keys.append(key)
            if is_learnt and self.previous >= 0:  # nothing stands before a text's very first token
                self.label_positions.append(self.previous)
                self.labels.append(token)
            self.input_ids += [token] * count
            self.position_ids += range(position, position + count)
            self.branch_ids += [branch_id] * count
            self.previous = len(self.input_ids) - 1
            position += count
        return True

    def skip(self, ids: Sequence[int]) -> None:
        for token in ids:
            is_image = token == self.limits.image_token_id
            self.num_cut += self.limits.num_image_tokens(next(self.keys)) if is_image else 1

    def row(self) -> Row:
        return Row(
            tuple(self.kept_keys),
            _array(self.input_ids),
            _array(self.position_ids),
            _array(self.branch_ids),
            _array(self.label_positions),
            _array(self.labels),
            self.num_cut,
        )


def _array(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)
