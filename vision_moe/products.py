"""Matrix products of linear layers, by the quickest kernel at hand.

On a CPU PyTorch takes MKL's fp32 product, which on AMD's AVX-512 processors runs at about half the
speed of oneDNN's (90 against 210 GFLOP/s on one EPYC core of 2025, either in full fp32). oneDNN
keeps a kernel for each shape that it has met: short products are not worth one.

S (token, expert) pairs, sorted by expert; E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Multiply-adds from which oneDNN's new kernel for a shape (0.3 ms) is paid back.
_WORTH_A_KERNEL = 2**25


_onednn = True


@contextmanager
def pytorch_products() -> Iterator[None]:
    """Leave every product to PyTorch's choice while the block lasts, to compare."""
    global _onednn
    before, _onednn = _onednn, False
    try:
        yield
    finally:
        _onednn = before


def num_filling_rows(num_rows: int) -> int:
    """How many more bring a product to a round number of rows; less than one in 32.

    In bf16 on a CPU oneDNN compiles a kernel anew for every number.
    """
    return -num_rows % (1 << (num_rows // 64).bit_length())


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` for a linear layer and ``(S, in)``; in fp32 inference on a CPU by oneDNN."""
    if not _suits_onednn(layer, x):
        return layer(x)
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")


def _suits_onednn(layer: Any, x: Tensor) -> bool:
    return bool(
        _onednn
        and type(layer) is nn.Linear                        # not an adapter or a quantised layer
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and x.numel() * layer.out_features >= _WORTH_A_KERNEL
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not torch.is_autocast_enabled("cpu")
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


@torch.library.custom_op("vision_moe::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weights: Sequence[Tensor], ends: Tensor) -> Tensor:
    """Multiply each group of rows with its own weight, as one operation.

    To ``torch.compile`` it is opaque: how many rows a group has is known when it runs.

    Args:
        x: ``(S, in)``, sorted by expert.
        weights: E of ``(out, in)``.
        ends: ``(E,)`` int32, where each expert's rows end.

    Returns:
        ``(S, out)``.
    """
    if _has_grouped_kernel(x):
        stacked = torch.stack(list(weights)).transpose(-2, -1)
        return nn.functional.grouped_mm(x, stacked, offs=ends)
    output = x.new_empty(x.shape[0], weights[0].shape[0])
    for group, out, weight in zip(*_groups(ends, x, output), weights, strict=True):
        torch.mm(group, weight.t(), out=out)
    return output


@grouped_linear.register_fake
def _(x: Tensor, weights: Sequence[Tensor], ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.custom_op("vision_moe::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], ends: Tensor
) -> list[Tensor]:
    """Gradients of ``x`` and of every weight; zeros for an expert without rows."""
    if _has_grouped_kernel(x):
        grad = grad.contiguous()
        grad_x = nn.functional.grouped_mm(grad, torch.stack(list(weights)), offs=ends)
        stacked = nn.functional.grouped_mm(grad.t(), x, offs=ends)
        return [grad_x, *(one.clone() for one in stacked.unbind(0))]
    grad_x = torch.empty_like(x)
    grads = []
    for rows, group, out, weight in zip(*_groups(ends, grad, x, grad_x), weights, strict=True):
        torch.mm(rows, weight, out=out)
        grads.append(rows.t() @ group)
    return [grad_x, *grads]


@_grouped_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Sequence[Tensor], ends: Tensor) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(weight) for weight in weights)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, ends = inputs
    ctx.save_for_backward(x, ends, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, ends, *weights = ctx.saved_tensors
    grad_x, *grads = _grouped_linear_backward(grad, x, weights, ends)
    return grad_x, grads, None


grouped_linear.register_autograd(_backward, setup_context=_setup_context)


def _groups(ends: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split the rows of each tensor at ``ends``."""
    bounds = [0, *ends.tolist()]
    counts = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    return [tensor.split(counts) for tensor in tensors]


def _has_grouped_kernel(x: Tensor) -> bool:
    """``grouped_mm`` is one kernel on GPUs from Ampere on; elsewhere a loop is no slower."""
    return (
        hasattr(nn.functional, "grouped_mm")
        and x.device.type == "cuda"
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
