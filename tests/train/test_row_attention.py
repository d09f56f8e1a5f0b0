"""Rows laid end to end: what each layer computes is what it computes of each row alone."""

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from train.instruction_data import PADDING, shared_prefix_mask
from train.row_attention import LineOfRows, row_attention, use_row_attention

# Two rows: a prefix of two with branches of two and one; a prefix of three.
BRANCHES = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, PADDING, PADDING]])


class Heads(torch.nn.Module):
    num_key_value_groups = 2


@pytest.mark.parametrize("longest", [0, 1024])
def test_line_of_rows_equals_padded_rows(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    monkeypatch.setattr("train.row_attention._LONGEST_FOR_PLAIN_PRODUCTS", longest)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    sees = shared_prefix_mask(BRANCHES)
    bias = torch.zeros_like(sees, dtype=torch.float32).masked_fill(~sees, -torch.inf)
    places = (BRANCHES != PADDING).flatten().nonzero().squeeze(1)

    def line(rows: torch.Tensor) -> torch.Tensor:
        return rows.transpose(1, 2).flatten(0, 1)[places].transpose(0, 1)[None]

    inputs = [one.requires_grad_() for one in (query, key, value)]
    padded, _ = sdpa_attention_forward(Heads(), *inputs, sees)
    rows = LineOfRows(places, bias, (BRANCHES != PADDING).sum(1))
    mixed, _ = row_attention(Heads(), *map(line, inputs), bias, rows=rows)
    expected = padded.flatten(0, 1)[places]
    # Measured worst: 2e-7, of gradients 5e-7.
    torch.testing.assert_close(mixed[0], expected, rtol=0, atol=1e-5)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(mixed[0], inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_language_model_without_rows_is_the_stock_one(language_model: Any) -> None:
    ids = torch.arange(12)[None]
    before = language_model(ids).logits
    use_row_attention(language_model.model)
    torch.testing.assert_close(language_model(ids).logits, before)
    assert "attn" not in language_model.config.to_json_string().replace("attention", "")
