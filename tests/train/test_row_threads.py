"""Rows in several threads: what they are in one, and again the same when it is repeated."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.instruction_data import PADDING
from train.instruction_model import InstructionModel
from train.lora import inject_lora
from train.recipe import LLMTraining
from train.row_attention import LineOfRows
from train.row_threads import run_in_threads
from vision_moe import num_filling_rows


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def line_of_rows(lengths: list[int], read: list[int] | None = None) -> LineOfRows:
    longest = max(lengths)
    places = [row * longest + at for row, length in enumerate(lengths) for at in range(length)]
    bias = torch.arange(len(lengths)).float()[:, None, None, None].expand(-1, 1, longest, longest)
    told = None if read is None else torch.tensor(read)
    return LineOfRows(torch.tensor(places), bias, torch.tensor(lengths), told)


@pytest.mark.parametrize(
    ("lengths", "count", "ends"),
    [
        ([4, 4, 4, 4], 2, [8, 16]),
        ([10, 1, 1, 1], 2, [10, 13]),
        ([1, 1, 1, 10], 2, [3, 13]),
        ([1, 1, 9], 3, [1, 2, 11]),
        ([9, 1, 1], 3, [9, 10, 11]),
    ],
)
def test_parts_are_whole_rows_and_even(lengths: list[int], count: int, ends: list[int]) -> None:
    parts = line_of_rows(lengths).parts(count)
    assert [place.stop for place, _ in parts] == ends
    assert [place.start for place, _ in parts] == [0, *ends[:-1]]
    assert torch.cat([rows.lengths for _, rows in parts]).tolist() == lengths
    for place, rows in parts:
        assert rows.token_places.numel() == place.stop - place.start == rows.lengths.sum()


def test_a_part_knows_its_own_tokens() -> None:
    (_, first), (_, second) = line_of_rows([2, 3, 3], [0, 1, 4, 5, 7]).parts(2)
    assert first.read is not None and second.read is not None
    assert (first.read.tolist(), second.read.tolist()) == ([0, 1, 4], [0, 2])
    assert second.token_places.tolist() == [0, 1, 2]
    assert second.bias.flatten()[0] == 2  # that of the third row


class Gated(nn.Module):
    """Stands for a language model: every row of a part alike."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.unread = nn.Parameter(torch.randn(4))

    def forward(self, line: Tensor, place: slice, rows: LineOfRows) -> Tensor:
        assert line.shape[1] == rows.lengths.sum()
        return (line @ self.weight).sigmoid()


@pytest.mark.parametrize("with_line", [True, False])
def test_threads_compute_what_one_does(with_line: bool) -> None:
    torch.manual_seed(0)
    model = Gated()
    line = torch.randn(1, 16, 4, requires_grad=with_line)
    rows = line_of_rows([3, 5, 2, 6])
    parameters = list(model.parameters())
    output = run_in_threads(model, line, rows, parameters)
    assert "InThreads" in type(output.grad_fn).__name__
    expected = model(line, slice(None), rows)
    torch.testing.assert_close(output, expected)
    wanted = [*parameters, *([line] if with_line else [])]
    grad = torch.randn_like(output)
    theirs = torch.autograd.grad(expected, wanted, grad, allow_unused=True)
    ours = torch.autograd.grad(output, wanted, grad, allow_unused=True)
    assert ours[1] is None and theirs[1] is None
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_fault_of_a_thread_is_the_caller_s() -> None:
    def fail(line: Tensor, place: slice, rows: LineOfRows) -> Tensor:
        raise FloatingPointError(f"rows from {place.start}")

    with pytest.raises(FloatingPointError, match="rows from 0"):
        run_in_threads(fail, torch.zeros(1, 4, 4), line_of_rows([2, 2]), [])


BRANCHES = torch.tensor(
    [[0, 0, 1, 1, 2], [0, 0, 0, PADDING, PADDING], [0, 1, 1, 1, PADDING], [0, 0, 1, 1, 1]]
)


def batch(llava: Any) -> dict[str, Tensor]:
    """Four rows without a picture; each row's last token but one is followed by a label."""
    generator = torch.Generator().manual_seed(3)
    is_token = BRANCHES != PADDING
    places = is_token.flatten().nonzero().squeeze(1)
    lengths = is_token.sum(1)
    positions = torch.arange(5).repeat(4, 1)
    labelled = torch.arange(4) * 5 + lengths - 2
    return {
        "input_ids": torch.randint(3, 30, BRANCHES.shape, generator=generator),
        "position_ids": positions,
        "branch_ids": BRANCHES,
        "token_places": places,
        "row_lengths": lengths,
        "label_positions": labelled,
        "labels": torch.randint(3, 30, (4,), generator=generator),
        "read_tokens": (is_token.flatten().cumsum(0) - 1)[labelled],
        "image_features": torch.zeros(0, 1, llava.config.vision_config.hidden_size),
    }


def adapted(llava: Any) -> InstructionModel:
    """Adapters learn, all else is frozen."""
    llava = copy.deepcopy(llava).requires_grad_(False).train()
    settings = LLMTraining(mode="lora", lr=1e-3, target=["q_proj", "down_proj"], r=4)
    inject_lora(llava.model.language_model, "llm", settings, seed=0)
    for name, parameter in llava.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return InstructionModel(llava)


def step(model: InstructionModel, threads: int) -> list[Tensor]:
    """The loss, and the gradients of what trains."""
    torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(model.llava))["loss"]
    trained = [one for one in model.parameters() if one.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_llava_learns_the_same_in_threads(mllm: Any, checkpointing: bool) -> None:
    model = adapted(mllm[0])
    if checkpointing:
        model.checkpoint_blocks()
    alone, together, again = step(model, 1), step(model, 3), step(model, 3)
    assert all(map(torch.equal, together, again))
    for one, other in zip(alone, together, strict=True):
        # Sums over the parts' tokens are rounded elsewhere; measured: 0.0042 of the largest.
        assert (one - other).abs().max() < 0.03 * one.abs().max()


@pytest.mark.parametrize("threads", [1, 3])
def test_filling_tokens_change_nothing(
    mllm: Any, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    model = adapted(mllm[0])
    bare = step(model, threads)
    lengths: list[int] = []
    monkeypatch.setattr(
        "train.instruction_model.num_filling_rows", lambda number: lengths.append(number) or 5
    )
    filled = step(model, threads)
    assert sum(lengths) == int((BRANCHES != PADDING).sum()) and len(lengths) == threads
    for one, other in zip(bare, filled, strict=True):
        assert (one - other).abs().max() < 0.03 * one.abs().max()


def test_lines_are_filled_to_few_lengths() -> None:
    filled = {number + num_filling_rows(number) for number in range(512, 1024)}
    assert len(filled) == 33
    assert all(0 <= 32 * num_filling_rows(number) < number for number in range(1, 4000))
