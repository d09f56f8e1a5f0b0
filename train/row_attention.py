"""Attention within rows that are laid end to end, so that no other layer sees padding.

A batch of rows reaches the language model as one line of tokens. Here alone they are rows again. On
a CPU each row is taken by itself: its products and weights fit into the processor's cache, and none
of them is padding. Elsewhere rows are padded to the longest and go to PyTorch's kernels.

B rows, L tokens of the longest, l of one, T of all, H heads, K key-value heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from train.fused_passes import by_head, by_token

ROW_ATTENTION = "rows"

# Measured on one core in bf16, forward and backward, 9 heads of width 64: plain products take a
# fifth to a half of the time of PyTorch's kernels from 130 to 800 tokens; what they keep for the
# backward pass grows with the square of the length.
_LONGEST_FOR_PLAIN_PRODUCTS = 1024


@dataclass
class LineOfRows:
    """Where the rows of a batch are in the line, and what their tokens see.

    Attributes:
        token_places: ``(T,)``, where a token is, not padding; into the flattened ``(B * L)``.
        bias: ``(B, 1, L, L)``, 0 where the query (third) sees the key (fourth), else negative
            infinity, in the format that attention computes in.
        lengths: ``(B,)``, tokens of each row.
        read: Numbers of the tokens, in the line, whose last hidden state somebody reads; all by
            default.
    """

    token_places: Tensor
    bias: Tensor
    lengths: Tensor
    read: Tensor | None = None
    _biases: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def suits_plain_products(self) -> bool:
        return self.bias.device.type == "cpu" and self.bias.shape[-1] <= _LONGEST_FOR_PLAIN_PRODUCTS

    def biases(self, num_heads: int) -> list[Tensor]:
        """``(num_heads * l, l)`` of each row: its bias, repeated; the same for every layer."""
        if num_heads not in self._biases:
            self._biases[num_heads] = [
                bias[0, :length, :length].repeat(num_heads, 1)
                for bias, length in zip(self.bias, self.lengths.tolist(), strict=True)
            ]
        return self._biases[num_heads]

    @property
    def ends(self) -> Tensor:
        """``(B,)``, of the rows in the line."""
        return self.lengths.cumsum(0)

    def pieces(self, line: Tensor) -> Iterator[Tensor]:
        """Of each row ``(N, l, d)``, for a line ``(T, N, d)`` as
        :func:`train.fused_passes.by_head` gives it."""
        _, num_heads, width = line.shape
        heads = line.view(-1, width)
        start = 0
        for length in self.lengths.tolist():
            stop = start + num_heads * length
            yield heads[start:stop].view(num_heads, length, width)
            start = stop

    def parts(self, count: int) -> list[tuple[slice, LineOfRows]]:
        """Rows in a row, as evenly by tokens as they can be split; with their place in the line.

        Args:
            count: Of parts; no more than there are rows.
        """
        ends = [0, *self.ends.tolist()]                                # of rows, in the line
        length = self.bias.shape[-1]
        parts, first = [], 0
        for number in range(1, count + 1):
            # Of the rows' ends that leave a row to every other part the one that is nearest.
            can_end = range(first + 1, len(ends) - count + number)
            last = min(can_end, key=lambda row: abs(ends[row] - ends[-1] * number / count))
            start, stop = ends[first], ends[last]
            rows, read = slice(first, last), self.read
            if read is not None:
                read = read[(read >= start) & (read < stop)] - start
            places = self.token_places[start:stop] - first * length
            part = LineOfRows(places, self.bias[rows], self.lengths[rows], read)
            parts.append((slice(start, stop), part))
            first = last
        return parts


def use_row_attention(language_model: PreTrainedModel) -> None:
    """Let a language model take ``rows``; without them it computes what it did before."""
    language_model.set_attn_implementation(ROW_ATTENTION)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rows: LineOfRows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: The attention layer.
        query: ``(1, H, T, d)``.
        key: ``(1, K, T, d)``.
        value: ``(1, K, T, d)``.
        attention_mask: The rows' bias.
        dropout: Of the attention's weights.
        scaling: Of the products; ``d ** -0.5`` by default.
        rows: Where they are in the line; stock attention without.
        options: For PyTorch's kernels.

    Returns:
        ``(1, T, H, d)``.
    """
    if rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if rows.suits_plain_products and dropout == 0:
        heads = torch.cat([query[0], key[0], value[0]]).transpose(0, 1).to(rows.bias.dtype)
        return attend(heads, query.shape[1], rows, scaling)[None], None
    num_rows, _, length, _ = rows.bias.shape

    def in_rows(line: Tensor) -> Tensor:
        tokens = line[0].transpose(0, 1)
        padded = tokens.new_zeros(num_rows * length, *tokens.shape[1:])
        return (
            padded.index_copy(0, rows.token_places, tokens)
            .unflatten(0, (num_rows, length))
            .transpose(1, 2)
        )

    mixed, _ = sdpa_attention_forward(
        module, in_rows(query), in_rows(key), in_rows(value), rows.bias,
        dropout=dropout, scaling=scaling, **options,
    )  # fmt: skip
    return mixed.flatten(0, 1)[rows.token_places][None], None


def attend(
    heads: Tensor,
    num_heads: int,
    rows: LineOfRows,
    scaling: float | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Plain products, row by row.

    Args:
        heads: ``(T, H + 2 K, d)``: queries, keys, values; T may be more than the rows hold.
        num_heads: H.
        rows: Where they are in the line.
        scaling: Of the products; ``d ** -0.5`` by default.
        positions: Cosine and sine, each ``(T, d)`` fp32 with two equal halves, of the rotary
            positions that queries and keys in bf16 are turned to; they are by now without.

    Returns:
        ``(T, H, d)``, 0 after the last row.
    """
    scaling = heads.shape[-1] ** -0.5 if scaling is None else scaling
    half = heads.shape[-1] // 2
    if positions is None:
        cos = sin = torch.empty(0, 0, device=heads.device)
    else:
        cos, sin = (one[:, :half].contiguous() for one in positions)
    # Outside of autocast, which would widen all of it: the sums inside are in fp32 anyway.
    with torch.autocast(heads.device.type, enabled=False):
        mixed: Tensor = _Attend.apply(heads, num_heads, rows, scaling, cos, sin)
    return mixed


class _Attend(torch.autograd.Function):
    """Its backward pass by hand: autograd would pad and add what here is written in place."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        num_heads: int,
        rows: LineOfRows,
        scaling: float,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        num_keys = (heads.shape[1] - num_heads) // 2
        num_turned = num_heads + num_keys if len(cos) else 0
        pieces = by_head(heads, rows.ends, cos, sin, num_turned)
        mixed = heads.new_empty(heads.shape[0], num_heads, heads.shape[2])
        kept = []
        biases = rows.biases(num_heads // num_keys)
        for bias, inside, out in zip(biases, rows.pieces(pieces), rows.pieces(mixed), strict=True):
            query, key, value = _grouped(inside, num_heads, num_keys)
            scores = torch.baddbmm(
                bias.expand(num_keys, -1, -1), query, key.transpose(1, 2), alpha=scaling
            )
            weights = scores.softmax(-1)                               # in fp32 inside
            torch.bmm(weights, value, out=out.view_as(query))
            kept.append(weights)
        ctx.save_for_backward(pieces, cos, sin, *kept)
        ctx.rows, ctx.num_heads, ctx.num_turned, ctx.scaling = rows, num_heads, num_turned, scaling
        return by_token(mixed, rows.ends, cos, sin, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        pieces, cos, sin, *kept = ctx.saved_tensors
        rows, num_heads = ctx.rows, ctx.num_heads
        num_keys = (pieces.shape[1] - num_heads) // 2
        grad_mixed = by_head(grad, rows.ends, cos, sin, 0)
        grad_pieces = torch.empty_like(pieces)
        parts = (rows.pieces(one) for one in (pieces, grad_mixed, grad_pieces))
        for weights, inside, grad_out, grad_inside in zip(kept, *parts, strict=True):
            query, key, value = _grouped(inside, num_heads, num_keys)
            grad_query, grad_key, grad_value = _grouped(grad_inside, num_heads, num_keys)
            grad_out = grad_out.view_as(query)
            grad_weights = grad_out @ value.transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            _scaled_product(grad_scores, key, ctx.scaling, grad_query)
            _scaled_product(grad_scores.transpose(1, 2), query, ctx.scaling, grad_key)
            torch.bmm(weights.transpose(1, 2), grad_out, out=grad_value)
        grad_heads = by_token(grad_pieces, rows.ends, cos, -sin, ctx.num_turned)
        return grad_heads, None, None, None, None, None


def _grouped(inside: Tensor, num_heads: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(K, H/K * l, d)`` queries, of all heads that share a key; keys and values ``(K, l, d)``."""
    query, key, value = inside.split([num_heads, num_keys, num_keys])
    return query.view(num_keys, -1, query.shape[-1]), key, value


def _scaled_product(one: Tensor, other: Tensor, scaling: float, out: Tensor) -> None:
    torch.baddbmm(out, one, other, beta=0, alpha=scaling, out=out)


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)
