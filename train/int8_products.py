"""Products with frozen weights in whole numbers of 8 bits.

The weight is rounded once; what it is multiplied with, token by token as it comes; the sums of
their products are exact, in 32 bits (W8A8: LLM.int8(), arXiv 2208.07339, forwards and SwitchBack,
arXiv 2304.13013, backwards, where gradients pass a weight on their way to what trains). A processor
with dot products of bytes and without matrix units computes them twice as fast as those of bf16.

T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from train.fused_passes import LARGEST_INT8, quantize_rows, scale_sums

# Few enough that the sums stay in the processor's cache.
_TOKENS_AT_ONCE = 256


class RoundedWeight:
    """A weight that does not train.

    Args:
        weight: ``(out, in)``.
        smoothing: ``(in,)``, above 0: what its columns are multiplied with and inputs divided by,
            before either is rounded (SmoothQuant, arXiv 2211.10438).
    """

    def __init__(self, weight: Tensor, smoothing: Tensor | None = None) -> None:
        weight = weight.float()
        if smoothing is None:
            smoothing = weight.new_ones(weight.shape[1])
        weight = weight * smoothing
        self.input_scales = 1 / smoothing                                        # (in,)
        self.output_scales = weight.abs().amax(dim=1) / LARGEST_INT8             # (out,)
        steps = self.output_scales.clamp(min=torch.finfo(torch.float32).tiny)
        self.values = weight.div_(steps[:, None]).round_().to(torch.int8)        # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        """``(T, in)`` bf16 to ``(T, out)`` bf16."""
        return rounded_product(x, self.input_scales, self.values.t(), self.output_scales)

    def backward(self, grad: Tensor) -> Tensor:
        """``(T, out)`` bf16 to ``(T, in)`` bf16: sums over outputs, whose scales go to ``grad``."""
        return rounded_product(grad, self.output_scales, self.values, self.input_scales)


@torch.library.custom_op("mllm_moe::rounded_product", mutates_args=())
def rounded_product(
    x: Tensor, input_scales: Tensor, values: Tensor, output_scales: Tensor
) -> Tensor:
    """``((x * input_scales) @ values) * output_scales``, each row of the first factor rounded.

    Args:
        x: ``(T, K)`` bf16.
        input_scales: ``(K,)`` fp32.
        values: ``(K, N)`` int8.
        output_scales: ``(N,)`` fp32.

    Returns:
        ``(T, N)`` bf16.
    """
    x = x.contiguous()
    product = _product_of(x, values)
    count = min(len(x), _TOKENS_AT_ONCE)
    rows = torch.empty(count, x.shape[1], dtype=torch.int8)
    scale = torch.empty(count)
    sums = torch.empty(count, values.shape[1], dtype=torch.int32)
    for part, out in zip(x.split(_TOKENS_AT_ONCE), product.split(_TOKENS_AT_ONCE), strict=True):
        size = len(part)
        quantize_rows(part, input_scales, rows[:size], scale[:size])
        torch._int_mm(rows[:size], values, out=sums[:size])
        scale_sums(sums[:size], scale[:size], output_scales, out)
    return product


@rounded_product.register_fake
def _(x: Tensor, input_scales: Tensor, values: Tensor, output_scales: Tensor) -> Tensor:
    return _product_of(x, values)


@register_flop_formula(torch.ops.mllm_moe.rounded_product)
def _num_operations(
    x: tuple[int, int], _: tuple[int], values: tuple[int, int], *_others: Any, **_more: Any
) -> int:
    """Multiplications and additions, by the shapes of what goes in."""
    return 2 * x[0] * values[0] * values[1]


def _product_of(x: Tensor, values: Tensor) -> Tensor:
    return x.new_empty(len(x), values.shape[1])


def rounded_linear(x: Tensor, rounded: RoundedWeight, weight: Tensor | None = None) -> Tensor:
    """``F.linear`` of a weight that does not train.

    Args:
        x: ``(T, in)`` bf16.
        rounded: For the way back.
        weight: ``(out, in)`` bf16, for the way there; also the rounded one by default.
    """
    output: Tensor = _Linear.apply(x, rounded, weight)
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: RoundedWeight, weight: Tensor | None) -> Tensor:
        ctx.rounded = rounded
        return rounded.forward(x) if weight is None else F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rounded.backward(grad), None, None
