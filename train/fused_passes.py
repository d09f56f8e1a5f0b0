"""Passes over a line of tokens on a CPU, each made once where PyTorch makes several.

numba compiles them, once for a machine; threads run them side by side. A bf16 number is the upper
half of a float; to become one again a float is rounded to the nearest, of two that are as near to
the even one.

T tokens, D width, F width inside the MLP, N width of a product's input or output, B rows of tokens,
and in attention N heads of all kinds, d width of a head.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

#: What rounded rows hold at most, either way.
LARGEST_INT8 = 127

# What is no number stays none: no part of ``fastmath`` that takes for granted that there is none.
_compiled = numba.njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
)


@torch.library.custom_op("mllm_moe::add_and_normalize", mutates_args=())
def add_and_normalize(
    x: Tensor, update: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A residual sum and its RMS norm without gain.

    Args:
        x: ``(T, D)`` fp32.
        update: ``(T, D)`` bf16, or nothing to add.
        eps: Beside the mean square.

    Returns:
        The sum ``(T, D)`` fp32, of size 0 where nothing is added; what it is divided by its root
        mean square, ``(T, D)`` bf16; and one over that, ``(T,)`` fp32.
    """
    x = x.contiguous()
    total, normed, scale = _outputs(x, update)
    added = normed.new_empty(0, 0) if update is None else update.contiguous()
    inputs = _array(x), _array(added)
    _add_and_normalize(*inputs, _array(total), _array(normed), _array(scale), eps)
    return total, normed, scale


@add_and_normalize.register_fake
def _(x: Tensor, update: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, update)


def _outputs(x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0, 0) if update is None else torch.empty_like(x)
    return total, torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x))


@torch.library.custom_op("mllm_moe::normalize_backward", mutates_args=())
def normalize_backward(
    grad_normed: Tensor, normed: Tensor, scale: Tensor, grad_total: Tensor, halve: bool
) -> tuple[Tensor, Tensor]:
    """Backward pass of :func:`add_and_normalize`.

    Args:
        grad_normed: ``(T, D)`` bf16.
        normed: As it was returned.
        scale: Likewise.
        grad_total: ``(T, D)`` fp32, of the sum, from what else read it.
        halve: Whether there was an update.

    Returns:
        The gradient of the sum's parts, ``(T, D)``, in fp32, and in bf16 where ``halve`` says so.
    """
    grad, half = _gradients(grad_total, halve)
    inputs = [one.contiguous() for one in (grad_normed, normed, scale, grad_total)]
    _normalize_backward(*map(_array, inputs), *map(_array, (grad, half)))
    return grad, half


@normalize_backward.register_fake
def _(
    grad_normed: Tensor, normed: Tensor, scale: Tensor, grad_total: Tensor, halve: bool
) -> tuple[Tensor, Tensor]:
    return _gradients(grad_total, halve)


def _gradients(grad_total: Tensor, halve: bool) -> tuple[Tensor, Tensor]:
    size = grad_total.shape if halve else (0, 0)
    grad = torch.empty_like(grad_total, memory_format=torch.contiguous_format)
    return grad, grad.new_empty(size, dtype=torch.bfloat16)


@torch.library.custom_op("mllm_moe::by_head", mutates_args=())
def by_head(tokens: Tensor, ends: Tensor, cos: Tensor, sin: Tensor, num_turned: int) -> Tensor:
    """Put each head of a row in one piece, and turn the first heads to their tokens' positions.

    Args:
        tokens: ``(T, N, d)``; bf16 where heads are turned.
        ends: ``(B,)`` int64, of the rows in the line.
        cos: ``(T, d / 2)`` fp32 of the rotary positions, or empty.
        sin: Likewise.
        num_turned: Number of heads that are turned.

    Returns:
        ``(T, N, d)`` in memory; the ``N * l`` heads of a row of ``l`` tokens lie where the row
        does, as ``(N, l, d)``. What is behind the last row is not set.
    """
    pieces = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    _move(tokens.contiguous(), pieces, True, ends, cos, sin, num_turned)
    return pieces


@by_head.register_fake
def _(tokens: Tensor, ends: Tensor, cos: Tensor, sin: Tensor, num_turned: int) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


@torch.library.custom_op("mllm_moe::by_token", mutates_args=())
def by_token(pieces: Tensor, ends: Tensor, cos: Tensor, sin: Tensor, num_turned: int) -> Tensor:
    """:func:`by_head` the other way round; heads are turned by ``cos`` and ``sin`` as they are, and
    tokens behind the last row are 0."""
    tokens = torch.empty_like(pieces)
    tokens[int(ends[-1]) :] = 0
    _move(pieces, tokens, False, ends, cos, sin, num_turned)
    return tokens


@by_token.register_fake
def _(pieces: Tensor, ends: Tensor, cos: Tensor, sin: Tensor, num_turned: int) -> Tensor:
    return torch.empty_like(pieces)


@torch.library.custom_op("mllm_moe::swiglu", mutates_args=())
def swiglu(gate_and_up: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate_and_up: ``(T, 2 F)`` bf16.

    Returns:
        ``(T, F)`` bf16.
    """
    inner = _half_as_wide(gate_and_up)
    _swiglu(_array(gate_and_up.contiguous()), _array(inner))
    return inner


@swiglu.register_fake
def _(gate_and_up: Tensor) -> Tensor:
    return _half_as_wide(gate_and_up)


def _half_as_wide(x: Tensor) -> Tensor:
    return x.new_empty(len(x), x.shape[1] // 2)


@torch.library.custom_op("mllm_moe::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    """Backward pass of :func:`swiglu`.

    Args:
        grad: ``(T, F)`` bf16.
        gate_and_up: ``(T, 2 F)`` bf16.

    Returns:
        ``(T, 2 F)`` bf16.
    """
    grads = torch.empty_like(gate_and_up, memory_format=torch.contiguous_format)
    _swiglu_backward(*map(_array, (grad.contiguous(), gate_and_up.contiguous(), grads)))
    return grads


@swiglu_backward.register_fake
def _(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    return torch.empty_like(gate_and_up, memory_format=torch.contiguous_format)


def quantize_rows(x: Tensor, gain: Tensor, rows: Tensor, scale: Tensor) -> None:
    """Round each row to whole numbers from -127 to 127, of which its largest is one.

    Args:
        x: ``(T, N)`` bf16.
        gain: ``(N,)`` fp32, multiplied in before.
        rows: ``(T, N)`` int8, filled.
        scale: ``(T,)`` fp32, filled with what each row is to be multiplied with: no finite number
            where the row holds one that is not.
    """
    _quantize_rows(*map(_array, (x, gain, rows, scale)))


def scale_sums(sums: Tensor, rows: Tensor, columns: Tensor, scaled: Tensor) -> None:
    """Sums of products of whole numbers as what they stand for.

    Args:
        sums: ``(T, N)`` int32.
        rows: ``(T,)`` fp32, what each row is multiplied with.
        columns: ``(N,)`` fp32, what each column is.
        scaled: ``(T, N)`` bf16, filled.
    """
    _scale_sums(*map(_array, (sums, rows, columns, scaled)))


def _move(
    source: Tensor, target: Tensor, to_pieces: bool,
    ends: Tensor, cos: Tensor, sin: Tensor, num_turned: int,
) -> None:  # fmt: skip
    _, num_heads, width = source.shape
    heads = _array(source.view(-1, width)), _array(target.view(-1, width))
    positions = _array(ends), _array(cos), _array(sin)
    _regroup(*heads, to_pieces, *positions, num_turned, num_heads)


def _array(tensor: Tensor) -> np.ndarray:
    """The same memory; bf16, which numpy has not, as whole numbers of 16 bits."""
    plain = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: np.ndarray = plain.numpy()
    return array


@_compiled
def _widened(half: Any) -> Any:
    return np.uint32(half) << np.uint32(16)


@_compiled
def _rounded(bits: Any) -> Any:
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_compiled
def _add_and_normalize(
    x: Any, update: Any, total: Any, normed: Any, scale: Any, eps: float
) -> None:
    width = x.shape[1]
    row = np.empty(width, np.float32)
    bits = row.view(np.uint32)
    for t in range(len(x)):
        squares = np.float32(0)
        if len(update):
            for i in range(width):
                bits[i] = _widened(update[t, i])
            for i in range(width):
                row[i] += x[t, i]
                total[t, i] = row[i]
                squares += row[i] * row[i]
        else:
            for i in range(width):
                row[i] = x[t, i]
                squares += row[i] * row[i]
        factor = np.float32(1 / np.sqrt(squares / np.float32(width) + eps))
        scale[t] = factor
        for i in range(width):
            row[i] *= factor
        for i in range(width):
            normed[t, i] = _rounded(bits[i])


@_compiled
def _normalize_backward(
    grad_normed: Any, normed: Any, scale: Any, grad_total: Any, grad: Any, half: Any
) -> None:
    width = normed.shape[1]
    ours, theirs = np.empty(width, np.float32), np.empty(width, np.float32)
    bits_of_ours, bits_of_theirs = ours.view(np.uint32), theirs.view(np.uint32)
    for t in range(len(normed)):
        for i in range(width):
            bits_of_ours[i] = _widened(grad_normed[t, i])
            bits_of_theirs[i] = _widened(normed[t, i])
        along = np.float32(0)
        for i in range(width):
            along += ours[i] * theirs[i]
        along /= np.float32(width)
        factor = scale[t]
        for i in range(width):
            ours[i] = (ours[i] - along * theirs[i]) * factor + grad_total[t, i]
            grad[t, i] = ours[i]
        if len(half):
            for i in range(width):
                half[t, i] = _rounded(bits_of_ours[i])


@_compiled
def _regroup(
    source: Any, target: Any, to_pieces: bool,
    ends: Any, cos: Any, sin: Any, num_turned: int, num_heads: int,
) -> None:  # fmt: skip
    """Between heads that lie by token, ``(T * N, d)``, and those that lie by row and head."""
    width = source.shape[1]
    half = width // 2
    head_now, turned = np.empty(width, np.float32), np.empty(width, np.float32)
    bits, turned_bits = head_now.view(np.uint32), turned.view(np.uint32)
    start = 0
    for end in ends:
        for t in range(start, end):
            for head in range(num_heads):
                by_token = t * num_heads + head
                piece = start * num_heads + head * (end - start) + t - start
                a, b = (by_token, piece) if to_pieces else (piece, by_token)
                if head >= num_turned:
                    for i in range(width):
                        target[b, i] = source[a, i]
                    continue
                for i in range(width):
                    bits[i] = _widened(source[a, i])
                for i in range(half):  # each half by the other
                    turned[i] = head_now[i] * cos[t, i] - head_now[i + half] * sin[t, i]
                    turned[i + half] = head_now[i + half] * cos[t, i] + head_now[i] * sin[t, i]
                for i in range(width):
                    target[b, i] = _rounded(turned_bits[i])
        start = end


# 2 ** f from -1/2 to 1/2, to 1e-7: numba's own exponential takes one number at a time.
_EXP2 = tuple(
    np.float32(one)
    for one in Chebyshev.interpolate(np.exp2, 6, [-0.5, 0.5]).convert(kind=Polynomial).coef
)
_LOG2_E = np.float32(np.log2(np.e))


@_compiled
def _sigmoid(x: Any, sigmoid: Any, power: Any) -> None:
    """``1 / (1 + 2 ** (whole + f))``; ``power`` is for the whole number's part."""
    bits = power.view(np.uint32)
    for i in range(len(x)):
        exponent = min(max(-_LOG2_E * x[i], np.float32(-126)), np.float32(126))
        whole = np.floor(exponent + np.float32(0.5))
        f = exponent - whole
        part = _EXP2[6]
        part = part * f + _EXP2[5]
        part = part * f + _EXP2[4]
        part = part * f + _EXP2[3]
        part = part * f + _EXP2[2]
        part = part * f + _EXP2[1]
        sigmoid[i] = part * f + _EXP2[0]
        bits[i] = np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23)
    for i in range(len(x)):
        sigmoid[i] = np.float32(1) / (np.float32(1) + sigmoid[i] * power[i])


@_compiled
def _swiglu(gate_and_up: Any, inner: Any) -> None:
    width = inner.shape[1]
    gate, up = np.empty(width, np.float32), np.empty(width, np.float32)
    sigmoid = np.empty(width, np.float32)
    gate_bits, up_bits = gate.view(np.uint32), up.view(np.uint32)
    for t in range(len(inner)):
        for i in range(width):
            gate_bits[i] = _widened(gate_and_up[t, i])
        _sigmoid(gate, sigmoid, up)
        for i in range(width):
            up_bits[i] = _widened(gate_and_up[t, width + i])
        for i in range(width):
            up[i] *= gate[i] * sigmoid[i]
        for i in range(width):
            inner[t, i] = _rounded(up_bits[i])


@_compiled
def _swiglu_backward(grad: Any, gate_and_up: Any, grads: Any) -> None:
    width = grad.shape[1]
    gate, up = np.empty(width, np.float32), np.empty(width, np.float32)
    sigmoid, into = np.empty(width, np.float32), np.empty(width, np.float32)
    gate_bits, up_bits, into_bits = (
        gate.view(np.uint32), up.view(np.uint32), into.view(np.uint32)
    )  # fmt: skip
    for t in range(len(grad)):
        for i in range(width):
            gate_bits[i] = _widened(gate_and_up[t, i])
        _sigmoid(gate, sigmoid, up)
        for i in range(width):
            up_bits[i] = _widened(gate_and_up[t, width + i])
            into_bits[i] = _widened(grad[t, i])
        for i in range(width):
            silu = gate[i] * sigmoid[i]
            slope = sigmoid[i] + silu * (np.float32(1) - sigmoid[i])
            gate[i] = into[i] * up[i] * slope
            up[i] = into[i] * silu
        for i in range(width):
            grads[t, i] = _rounded(gate_bits[i])
            grads[t, width + i] = _rounded(up_bits[i])


_MOST = np.float32(LARGEST_INT8)
# Added to a number below 2 ** 22, it leaves the nearest whole number in the lowest bits.
_ROUNDS = np.float32(1.5 * 2**23)


@_compiled
def _quantize_rows(x: Any, gain: Any, rows: Any, scale: Any) -> None:
    width = x.shape[1]
    row, found = np.empty(width, np.float32), np.empty(1, np.float32)
    bits, found_bits = row.view(np.uint32), found.view(np.uint32)
    for t in range(len(x)):
        for i in range(width):
            bits[i] = _widened(x[t, i])
        for i in range(width):
            row[i] *= gain[i]
        largest = np.uint32(0)  # without its sign a float is in the order of its bits
        for i in range(width):
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
        found_bits[0] = largest
        scale[t] = found[0] / _MOST
        factor = _MOST / found[0] if found[0] > 0 else np.float32(0)
        for i in range(width):
            row[i] = row[i] * factor + _ROUNDS
        for i in range(width):
            rows[t, i] = np.int8(bits[i])


@_compiled
def _scale_sums(sums: Any, rows: Any, columns: Any, scaled: Any) -> None:
    width = sums.shape[1]
    row = np.empty(width, np.float32)
    bits = row.view(np.uint32)
    for t in range(len(sums)):
        for i in range(width):
            row[i] = np.float32(sums[t, i]) * rows[t] * columns[i]
        for i in range(width):
            scaled[t, i] = _rounded(bits[i])
