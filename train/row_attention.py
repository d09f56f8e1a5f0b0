"""Attention within rows that are laid end to end, so that no other layer sees padding.

A batch of rows reaches the language model as one line of tokens. Here alone they are rows again,
padded to the longest, each with a mask of its own: what a block-diagonal mask over the line would
allow, without the blocks that it forbids.

B rows, L tokens of the longest, T of all, H heads, K key-value heads, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROW_ATTENTION = "rows"

# Measured on one core in bf16, forward and backward, 9 heads of width 64: plain products take a
# fifth to a half of the time of PyTorch's kernels from 130 to 800 tokens; what they keep for the
# backward pass grows with the square of the length.
_LONGEST_FOR_PLAIN_PRODUCTS = 1024


def use_row_attention(language_model: PreTrainedModel) -> None:
    """Let a language model take ``token_places``; without them it computes what it did before."""
    language_model.set_attn_implementation(ROW_ATTENTION)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    token_places: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: The attention layer.
        query: ``(1, H, T, d)``.
        key: ``(1, K, T, d)``.
        value: ``(1, K, T, d)``.
        attention_mask: ``(B, 1, L, L)``, 0 where the query (third) sees the key (fourth), else
            negative infinity.
        dropout: Of the attention's weights.
        scaling: Of the products; ``d ** -0.5`` by default.
        token_places: ``(T,)`` into the flattened ``(B * L)``; stock attention without.
        options: For PyTorch's kernels.

    Returns:
        ``(1, T, H, d)``.
    """
    if token_places is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    assert attention_mask is not None
    num_rows, _, length, _ = attention_mask.shape

    def in_rows(line: Tensor) -> Tensor:
        tokens = line[0].transpose(0, 1)
        rows = tokens.new_zeros(num_rows * length, *tokens.shape[1:])
        return (
            rows.index_copy(0, token_places, tokens)
            .unflatten(0, (num_rows, length))
            .transpose(1, 2)
        )

    query, key, value = in_rows(query), in_rows(key), in_rows(value)
    if query.device.type == "cpu" and length <= _LONGEST_FOR_PLAIN_PRODUCTS:
        mixed = _plain_products(query, key, value, attention_mask, dropout, scaling)
    else:
        mixed, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    return mixed.flatten(0, 1)[token_places][None], None


def _plain_products(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """``(B, L, H, d)``; the queries of the heads that share a key stand in one matrix."""
    num_rows, num_heads, length, width = query.shape
    grouped = (num_rows, key.shape[1], -1, width)
    scores = query.reshape(grouped) * (width**-0.5 if scaling is None else scaling)
    scores = (scores @ key.transpose(-1, -2)).view(num_rows, num_heads, length, length)
    # Outside of autocast, which would widen all of it: the sums inside are in fp32 anyway.
    with torch.autocast(query.device.type, enabled=False):
        weights = (scores + bias.to(scores.dtype)).softmax(-1)
        weights = nn.functional.dropout(weights, dropout)
        mixed = weights.view(num_rows, key.shape[1], -1, length) @ value.to(weights.dtype)
    return mixed.view(query.shape).transpose(1, 2)


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)
