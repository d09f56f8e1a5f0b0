"""Rows come out of their store as they went in; those without labels do not go in."""

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest

from mllm.prompts import ChatPrompts
from train.instruction_rows import InstructionSample, Pieces, RowLimits, chat_pieces, lay_out
from train.row_store import RowStore, collect_rows
from vision_moe import InputError

QUESTIONS = (("what is the color?", "red"), ("how many?", "two"), ("is it blue?", "no one"))
SAMPLES = [
    InstructionSample((0,), QUESTIONS),
    InstructionSample((), QUESTIONS[:1]),
    InstructionSample((2, 1), ((("is ", " or ", "?"), "red"), ("sure?", "yes")), is_dialogue=True),
]


@pytest.fixture
def prompts(mllm: Any) -> ChatPrompts:
    return ChatPrompts(mllm[1], 16)


def limits_of(prompts: ChatPrompts, max_tokens: int | None = None) -> RowLimits:
    return RowLimits(prompts.image_token_id, lambda key: 16 + key, max_tokens)


@pytest.mark.parametrize("max_tokens", [None, 70])
def test_rows_come_out_as_they_went_in(prompts: ChatPrompts, max_tokens: int | None) -> None:
    limits = limits_of(prompts, max_tokens)
    store = collect_rows(SAMPLES, partial(chat_pieces, prompts=prompts), limits)
    assert len(store) == len(SAMPLES)
    for number, (sample, row) in enumerate(zip(SAMPLES, store, strict=True)):
        expected = lay_out(chat_pieces(sample, prompts), limits)
        for field in fields(row):
            np.testing.assert_array_equal(getattr(row, field.name), getattr(expected, field.name))
        assert store.lengths[number] == len(row)
        assert store.image_keys(number) == sample.image_keys


def test_place_outside_of_the_store_is_no_row(prompts: ChatPrompts) -> None:
    store = RowStore(limits_of(prompts))
    store.append(Pieces((), [1], [[([2], True)]]), 2)
    assert store[-1].input_ids.tolist() == [1, 2] == store[:1][0].input_ids.tolist()
    with pytest.raises(IndexError):
        store[1]


def rows_of(prompts: ChatPrompts, num_whole: int) -> RowStore:
    """Samples that fit, and one whose picture alone is larger than the context."""
    samples = [InstructionSample((0,), QUESTIONS[:1])] * num_whole
    samples.append(InstructionSample((80,), QUESTIONS[:1], source="data.json, record 7"))
    return collect_rows(samples, partial(chat_pieces, prompts=prompts), limits_of(prompts, 90))


def test_rows_without_labels_are_left_out(prompts: ChatPrompts) -> None:
    assert len(rows_of(prompts, 100)) == 100


def test_too_many_rows_without_labels_stop_the_run(prompts: ChatPrompts) -> None:
    with pytest.raises(InputError, match="1 of 51 .* data.json, record 7 for one"):
        rows_of(prompts, 50)
