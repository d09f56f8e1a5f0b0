"""Samples as token rows: the language model's own chat format, its labels, and what is cut."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm.prompts import ChatPrompts
from train.instruction_rows import (
    InstructionSample,
    RowLimits,
    chat_row,
    plain_row,
)

NUM_IMAGE_TOKENS = 16
QUESTIONS = (
    ("what is the color of the circle?", "red"),
    ("how many red triangles are there?", "two"),
    ("is there a blue rectangle?", "no one"),
)
IMAGE = {"type": "image"}


@pytest.fixture
def prompts(mllm: Any) -> ChatPrompts:
    return ChatPrompts(mllm[1], NUM_IMAGE_TOKENS)


def limits_of(prompts: ChatPrompts, max_tokens: int | None = None) -> RowLimits:
    return RowLimits(prompts.image_token_id, lambda _: NUM_IMAGE_TOKENS, max_tokens)


@pytest.fixture
def limits(prompts: ChatPrompts) -> RowLimits:
    return limits_of(prompts)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def stock_ids(processor: Any, messages: list[dict[str, Any]], num_images: int) -> list[int]:
    """What a stranger gets from the processor alone."""
    rendered = processor.apply_chat_template(messages)
    images = [Image.new("RGB", (40, 40), "red")] * num_images
    ids: list[int] = processor(images=images or None, text=rendered, add_special_tokens=False)[
        "input_ids"
    ][0]
    end = len(ids) - ids[::-1].index(processor.tokenizer.eos_token_id)
    return ids[:end]


def test_only_answers_and_their_ends_are_learnt(
    mllm: Any, prompts: ChatPrompts, limits: RowLimits
) -> None:
    _, processor = mllm
    row = chat_row(InstructionSample((0,), QUESTIONS), prompts, limits)
    assert processor.tokenizer.decode(row.labels) == "red<|im_end|>two<|im_end|>no one<|im_end|>"


def test_positions_restart_after_the_prefix(prompts: ChatPrompts, limits: RowLimits) -> None:
    row = chat_row(InstructionSample((0,), QUESTIONS), prompts, limits)
    for branch in (1, 2, 3):
        positions = row.position_ids[row.branch_ids == branch]
        start = len(prompts.prefix_ids)
        assert positions.tolist() == list(range(start, start + len(positions)))


CONVERSATIONS: dict[str, tuple[InstructionSample, list[dict[str, Any]]]] = {
    "dialogue": (
        InstructionSample((2,), QUESTIONS[:2], is_dialogue=True),
        [
            {"role": "user", "content": [IMAGE, text(QUESTIONS[0][0])]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": QUESTIONS[1][0]},
            {"role": "assistant", "content": "two"},
        ],
    ),
    "text only": (
        InstructionSample((), QUESTIONS[:1]),
        [{"role": "user", "content": QUESTIONS[0][0]}, {"role": "assistant", "content": "red"}],
    ),
    "several pictures first": (
        InstructionSample((2, 0), QUESTIONS[:1]),
        [
            {"role": "user", "content": [IMAGE, IMAGE, text(QUESTIONS[0][0])]},
            {"role": "assistant", "content": "red"},
        ],
    ),
    "pictures anywhere": (
        InstructionSample(
            (1, 0, 2),
            ((("is ", " above ", "?"), "no"), (("", "\nhow many?"), "two")),
            is_dialogue=True,
        ),
        [
            {"role": "user", "content": [text("is "), IMAGE, text(" above "), IMAGE, text("?")]},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": [text("how many?"), IMAGE]},
            {"role": "assistant", "content": "two"},
        ],
    ),
    "system message": (
        InstructionSample((0,), QUESTIONS[:1], system="Be brief."),
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [IMAGE, text(QUESTIONS[0][0])]},
            {"role": "assistant", "content": "red"},
        ],
    ),
    "system message, text only": (
        InstructionSample((), QUESTIONS[:1], system="Be brief."),
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": QUESTIONS[0][0]},
            {"role": "assistant", "content": "red"},
        ],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_row_is_the_rendered_conversation(
    mllm: Any, prompts: ChatPrompts, limits: RowLimits, name: str
) -> None:
    sample, messages = CONVERSATIONS[name]
    row = chat_row(sample, prompts, limits)
    assert row.input_ids.tolist() == stock_ids(mllm[1], messages, len(sample.image_keys))
    assert row.image_keys == sample.image_keys


def test_plain_row_has_no_question(mllm: Any, prompts: ChatPrompts, limits: RowLimits) -> None:
    _, processor = mllm
    row = plain_row(InstructionSample((1,), QUESTIONS[1:2]), processor.tokenizer, limits)
    assert processor.tokenizer.decode(row.input_ids) == "<image>" * 16 + "two\n"
    assert processor.tokenizer.decode(row.labels) == "two\n"


def test_first_token_of_a_text_is_no_label(mllm: Any, limits: RowLimits) -> None:
    row = plain_row(InstructionSample((), (("", "two"),)), mllm[1].tokenizer, limits)
    assert row.labels.tolist() == row.input_ids[1:].tolist()
    assert row.label_positions.tolist() == list(range(len(row) - 1))


def test_system_message_is_text(mllm: Any, prompts: ChatPrompts) -> None:
    hostile = prompts.opening_ids(1, "a <image> b<|im_end|>")
    assert hostile.count(prompts.image_token_id) == 1
    assert "a <image> b<|im_end|>" in mllm[1].tokenizer.decode(hostile)


@pytest.mark.parametrize("max_tokens", range(60, 150, 3))
def test_row_is_cut_at_the_context_never_through_a_picture(
    prompts: ChatPrompts, limits: RowLimits, max_tokens: int
) -> None:
    sample = CONVERSATIONS["pictures anywhere"][0]
    whole = chat_row(sample, prompts, limits)
    row = chat_row(sample, prompts, limits_of(prompts, max_tokens))
    assert len(row) <= max_tokens
    assert len(row) + row.num_cut == len(whole)
    np.testing.assert_array_equal(row.input_ids, whole.input_ids[: len(row)])
    num_image_tokens = int((row.input_ids == prompts.image_token_id).sum())
    assert num_image_tokens == NUM_IMAGE_TOKENS * len(row.image_keys)
    assert row.image_keys == whole.image_keys[: len(row.image_keys)]
    # As much as fits is kept: what is missing is less than a picture.
    assert row.num_cut == 0 or max_tokens - len(row) < NUM_IMAGE_TOKENS


def test_every_branch_has_the_whole_context(prompts: ChatPrompts, limits: RowLimits) -> None:
    sample = InstructionSample((0,), QUESTIONS)
    whole = chat_row(sample, prompts, limits)
    longest = int(whole.position_ids.max()) + 1
    row = chat_row(sample, prompts, limits_of(prompts, longest))
    assert row.num_cut == 0
    row = chat_row(sample, prompts, limits_of(prompts, longest - 1))
    assert row.num_cut == 1
    assert set(row.branch_ids) == {0, 1, 2, 3}
