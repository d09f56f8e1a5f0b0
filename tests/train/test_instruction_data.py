"""Shared-prefix rows, their mask, batches; the loss equals that of separate stock sequences."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mllm.prompts import ChatPrompts
from train.instruction_data import collate, plan_epoch, shared_prefix_mask
from train.instruction_model import InstructionModel
from train.instruction_rows import InstructionSample, Row, RowLimits, chat_row, plain_row
from train.pictures import Pictures

QUESTIONS = (
    ("what is the color of the circle?", "red"),
    ("how many red triangles are there?", "two"),
    ("is there a blue rectangle?", "no one"),
)
SAMPLES = [
    InstructionSample((0,), QUESTIONS),
    InstructionSample((1,), QUESTIONS[1:2]),
    InstructionSample((2,), QUESTIONS[:2], is_dialogue=True),
]
SEVERAL = InstructionSample((2, 0), QUESTIONS[:2])
TEXT_ONLY = InstructionSample((), QUESTIONS[:2])
ANYWHERE = InstructionSample(
    (1, 0, 2),
    (
        (("is ", " above ", "?"), "no one"),
        ("why?", "yes"),
        (("", "\nhow many?"), "two"),
    ),
    is_dialogue=True,
)


def limits_of(model: Any, max_tokens: int | None = None) -> RowLimits:
    return RowLimits(
        model.config.image_token_id, lambda _: model.config.image_seq_length, max_tokens
    )


@pytest.fixture
def limits(mllm: Any) -> RowLimits:
    return limits_of(mllm[0])


@pytest.fixture
def prompts(mllm: Any) -> ChatPrompts:
    model, processor = mllm
    return ChatPrompts(processor, model.config.image_seq_length)


def pixel_values(processor: Any, number: int) -> Tensor:
    noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(noise)]
    return processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def features_of(model: Any, processor: Any) -> Pictures:
    """Features of three pictures."""
    pixels = torch.cat([pixel_values(processor, number) for number in range(3)])
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return lambda keys: {"image_features": states[-2][list(keys), 1:]}


def separate_sequences(row: Row) -> list[tuple[Tensor, Tensor]]:
    """``(input_ids, labels)`` ``(1, l)`` of each branch with the prefix before it."""
    sequences = []
    for branch in range(1, int(row.branch_ids.max()) + 1):
        kept = np.flatnonzero((row.branch_ids == 0) | (row.branch_ids == branch))
        ids = row.input_ids[kept]
        labels = np.full_like(ids, -100)
        for position, label in zip(row.label_positions, row.labels, strict=True):
            place = int(np.searchsorted(kept, position)) + 1
            if position in kept and place < len(ids) and ids[place] == label:
                labels[place] = label
        sequences.append((torch.from_numpy(ids)[None], torch.from_numpy(labels)[None]))
    return sequences


def stock_loss(model: Any, processor: Any, rows: list[Row]) -> Tensor:
    """Token-weighted mean of what LlavaForConditionalGeneration says of every sequence."""
    total, count = torch.zeros(()), 0
    for row in rows:
        pixels = [pixel_values(processor, key) for key in row.image_keys]
        for input_ids, labels in separate_sequences(row):
            output = model(
                input_ids=input_ids,
                pixel_values=torch.cat(pixels) if pixels else None,
                attention_mask=torch.ones_like(input_ids),
                labels=labels,
            )
            learnt = int((labels != -100).sum())
            total, count = total + output.loss * learnt, count + learnt
    assert count == sum(len(row.labels) for row in rows)
    return total / count


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_loss_and_gradients_equal_those_of_separate_stock_sequences(
    mllm: Any, prompts: ChatPrompts, limits: RowLimits, template: str
) -> None:
    model, processor = mllm
    model.model.vision_tower.requires_grad_(False)
    if template == "chat":
        samples = [*SAMPLES, SEVERAL, TEXT_ONLY, ANYWHERE]
        rows = [chat_row(sample, prompts, limits) for sample in samples]
    else:
        rows = [plain_row(sample, processor.tokenizer, limits) for sample in SAMPLES]
    batch = collate(rows, features_of(model, processor), pad_token_id=2)
    shared = InstructionModel(model)(**batch)["loss"]
    shared_gradients = gradients(model, shared)
    stock = stock_loss(model, processor, rows)
    stock_gradients = gradients(model, stock)
    # Measured worst: 1e-6 of a loss of 7, 3e-6 of the largest entry of a gradient.
    torch.testing.assert_close(shared, stock, rtol=1e-6, atol=0)
    assert shared_gradients.keys() == stock_gradients.keys()
    for name, gradient in stock_gradients.items():
        difference = (shared_gradients[name] - gradient).abs().max()
        assert difference <= 2e-5 * gradient.abs().max(), name


def test_read_tokens_are_those_that_labels_are_at(
    mllm: Any, prompts: ChatPrompts, limits: RowLimits
) -> None:
    model, processor = mllm
    rows = [chat_row(sample, prompts, limits) for sample in [*SAMPLES, TEXT_ONLY]]
    batch = collate(rows, features_of(model, processor), pad_token_id=2)
    in_rows = batch["token_places"][batch["read_tokens"]]
    assert in_rows.tolist() == sorted(set(batch["label_positions"].tolist()))


def test_loss_of_many_labels_is_that_of_few_at_a_time(
    mllm: Any, prompts: ChatPrompts, limits: RowLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = mllm
    rows = [chat_row(sample, prompts, limits) for sample in SAMPLES]
    batch = collate(rows, features_of(model, processor), pad_token_id=2)
    whole = InstructionModel(model)(**batch)["loss"]
    monkeypatch.setattr("train.chunked_loss._CHUNK", 3)
    torch.testing.assert_close(InstructionModel(model)(**batch)["loss"], whole)


def test_text_only_batch_leaves_the_connector_in_the_graph(
    mllm: Any, prompts: ChatPrompts, limits: RowLimits
) -> None:
    model, processor = mllm
    pictures = features_of(model, processor)
    batch = collate([chat_row(TEXT_ONLY, prompts, limits)], pictures, pad_token_id=2)
    InstructionModel(model)(**batch)["loss"].backward()
    connector = model.model.multi_modal_projector
    assert all(p.grad is not None and not p.grad.any() for p in connector.parameters())


def test_mask_of_two_branches_and_padding() -> None:
    mask = shared_prefix_mask(torch.tensor([[0, 1, 2, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    batch_rows=st.integers(1, 8),
    max_tokens=st.integers(1, 120),
    seed=st.integers(0, 9),
)
def test_epoch_holds_every_row_once_within_the_limits(
    lengths: list[int], batch_rows: int, max_tokens: int, seed: int
) -> None:
    batches = plan_epoch(lengths, batch_rows, max_tokens, np.random.default_rng(seed))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= batch_rows
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= max_tokens
