"""A language model's frozen blocks, for training below or beside them on a CPU.

The same function as transformers' own block under bf16 autocast, in fewer passes over memory:

weights    in bf16 once, not anew in every step; no weight has a gradient, no product computes one;
           what a mapped file holds of them in fp32 leaves the memory until it is used again
norms      their gains stand in the weights behind them; what the backward pass keeps is bf16
products   queries, keys and values are one, gate and up are one; so are their adapters
attention  row by row (:mod:`train.row_attention`), behind a rotation in place of five passes
SwiGLU     keeps its two inputs, and computes the rest again

Adapters (LoRA) train inside of it. T tokens, M that are read of the last block, D width, F width
inside the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from mllm.mapped_files import release_file_pages
from train.row_attention import LineOfRows, attend
from train.sharding import weights_are_spread

_FORMAT = torch.bfloat16
_KNOWN = (LlamaDecoderLayer, Qwen2DecoderLayer)
_READING = Lock()  # threads share a block (train.row_threads)


def use_frozen_blocks(language_model: PreTrainedModel) -> None:
    """Let blocks whose own weights are all frozen run as :class:`FrozenBlock`, in place.

    Without ``rows``, or not under bf16 autocast on a CPU, they compute what they did before.
    """
    layers: Any = language_model.layers
    for layer in layers:
        if type(layer) in _KNOWN and not isinstance(layer.forward, FrozenBlock):
            layer.forward = FrozenBlock(layer, is_last=layer is layers[-1])


def runs_frozen_blocks(language_model: PreTrainedModel, rows: LineOfRows) -> bool:
    """Whether all of its blocks run as :class:`FrozenBlock` with these rows."""
    layers: Any = language_model.layers
    return _suits_rows(rows) and all(
        isinstance(layer.forward, FrozenBlock) and _suits(layer) for layer in layers
    )


class FrozenBlock:
    """Stands for ``forward`` of a block.

    Its weights are read when it is first called, and anew when they have changed since. The last
    block's output is 0 where nobody reads it.
    """

    def __init__(self, layer: Any, is_last: bool = False) -> None:
        self.layer = layer
        self.is_last = is_last
        self.stock: Callable[..., Tensor] = layer.forward
        self._read: tuple[Any, ...] = ()
        self._weights: _Weights | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor],
        rows: LineOfRows | None = None,
        **options: Any,
    ) -> Tensor:
        """``(1, T, D)`` in, the same out; tokens after the last row's see and are seen by none."""
        weights = self._current_weights() if _suits_rows(rows) else None
        if weights is None or rows is None:
            return self.stock(
                hidden_states, *args, position_embeddings=position_embeddings, rows=rows, **options
            )
        inputs = (weights, hidden_states, position_embeddings, rows)
        if self.layer.gradient_checkpointing and self.layer.training and torch.is_grad_enabled():
            # transformers' own checkpointing is within the ``forward`` that this stands for.
            output: Tensor = checkpoint(self._compute, *inputs, use_reentrant=False)
            return output
        return self._compute(*inputs)

    def _compute(
        self,
        weights: _Weights,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        rows: LineOfRows,
    ) -> Tensor:
        attention = self.layer.self_attn
        num_heads = attention.config.num_attention_heads
        eps = self.layer.input_layernorm.variance_epsilon
        cos, sin = (one[0, :, None].float() for one in position_embeddings)      # (T, 1, d)
        x = hidden_states[0].float()
        heads = weights.heads(_norm(x, eps)).unflatten(-1, (-1, cos.shape[-1]))  # (T, H + 2 K, d)
        heads = _Rotate.apply(heads, num_heads, cos, sin)
        mixed = attend(heads, num_heads, rows, attention.scaling).flatten(1)     # (T, H d)
        read = rows.read if self.is_last else None
        if read is not None:
            x, mixed = x.index_select(0, read), mixed.index_select(0, read)      # of M tokens
        x = x + weights.output(mixed)
        inner = _SwiGLU.apply(weights.gate_and_up(_norm(x, eps)))                # (T, F)
        x = x + weights.down(inner)
        if read is not None:
            x = torch.zeros_like(hidden_states[0], dtype=x.dtype).index_copy(0, read, x)
        return x[None]

    def _current_weights(self) -> _Weights | None:
        """``None`` of a block that is not of the kind."""
        if not _suits(self.layer):
            self._read, self._weights = (), None
            return None
        layers = _linear_layers(self.layer)
        state = (*map(id, layers), *((id(one), one._version) for one in self._own()))
        with _READING:
            if self._weights is None or state != self._read:
                self._read, self._weights = state, None  # the old ones go first
                self._weights = _Weights(self.layer)
                release_file_pages(self.replaced)
            return self._weights

    @property
    def replaced(self) -> list[Tensor]:
        """Weights of the layer that nothing reads while this stands for it."""
        return [one for one in self._own() if self._weights is not None and one.dtype != _FORMAT]

    def _own(self) -> list[Tensor]:
        return [one for name, one in self.layer.named_parameters() if ".lora_" not in name]


def _suits_rows(rows: LineOfRows | None) -> bool:
    return rows is not None and rows.bias.dtype == _FORMAT and rows.suits_plain_products


def _suits(layer: Any) -> bool:
    return (
        layer.mlp.config.hidden_act == "silu"
        and layer.self_attn.attention_dropout == 0
        and all(_is_plain(one) for one in _linear_layers(layer))
        and all(
            parameter.device.type == "cpu" and (".lora_" in name or not parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        )
        # Weights that processes share are whole only while the stock block reads them.
        and not weights_are_spread()
    )


def _linear_layers(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    ]  # fmt: skip


def _is_plain(layer: Any) -> bool:
    """A linear layer, also with one adapter of the common kind; not quantised."""
    if type(layer) is nn.Linear:
        return True
    if type(getattr(layer, "base_layer", None)) is not nn.Linear or len(layer.lora_A) != 1:
        return False
    (name,) = layer.lora_A
    return (
        layer.active_adapters == [name]
        and not layer.merged
        and not layer.disable_adapters
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
    )


class _Weights:
    """Of a block, as its products read them."""

    def __init__(self, layer: Any) -> None:
        query, key, value, output, gate, up, down = _linear_layers(layer)
        before, between = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.heads = _Products([query, key, value], before)
        self.output = _Products([output])
        self.gate_and_up = _Products([gate, up], between)
        self.down = _Products([down])


class _Products:
    """Linear layers that read the same, as one product, and their adapters as another."""

    def __init__(self, layers: Sequence[Any], gain: Tensor | None = None) -> None:
        self.layers = layers
        self.gain = gain
        plain = [getattr(layer, "base_layer", layer) for layer in layers]
        whole = [layer.weight.detach() for layer in plain]
        if gain is not None:
            whole = [one.float() * gain.detach().float() for one in whole]
        halves = [one.to(_FORMAT) for one in whole]
        self.weight = halves[0] if len(halves) == 1 else torch.cat(halves)  # (out, in)
        biased = any(layer.bias is not None for layer in plain)
        self.bias = torch.cat([_bias_of(layer) for layer in plain]).to(_FORMAT) if biased else None

    def __call__(self, x: Tensor) -> Tensor:
        """``(T, in)`` to ``(T, out)``, the layers' results side by side."""
        product = F.linear(x, self.weight, self.bias)
        adapters = [_adapter_of(layer) for layer in self.layers]
        if not any(len(down) for down, _ in adapters):
            return product
        down = torch.cat([one for one, _ in adapters])                     # (ranks, in)
        if self.gain is not None:
            down = down * self.gain
        up = torch.block_diag(*(one for _, one in adapters))               # (out, ranks)
        return torch.addmm(product, F.linear(x, down.to(_FORMAT)), up.to(_FORMAT).t())


def _bias_of(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()


def _adapter_of(layer: Any) -> tuple[Tensor, Tensor]:
    """LoRA's A ``(rank, in)`` and scaled B ``(out, rank)``; of rank 0 where there is none."""
    if type(layer) is nn.Linear:
        return layer.weight.new_empty(0, layer.in_features), layer.weight.new_empty(
            layer.out_features, 0
        )
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]


def _norm(x: Tensor, eps: float) -> Tensor:
    normed: Tensor = _Norm.apply(x, eps)
    return normed


class _Norm(torch.autograd.Function):
    """``x / rms(x)`` over the last dimension, fp32 in, bf16 out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        normed = (x * scale).to(_FORMAT)
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        normed, scale = ctx.saved_tensors
        normed, grad = normed.float(), grad.float()
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / normed.shape[-1]
        return grad.addcmul_(normed, along, value=-1).mul_(scale), None


class _Rotate(torch.autograd.Function):
    """Rotary positions of queries and keys ``(T, H + 2 K, d)``; values stay."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, num_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        num_turned = (heads.shape[1] + num_heads) // 2
        ctx.save_for_backward(cos, sin)
        ctx.num_turned = num_turned
        return _turn(heads, num_turned, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, ctx.num_turned, cos, -sin), None, None, None


def _turn(heads: Tensor, num_turned: int, cos: Tensor, sin: Tensor) -> Tensor:
    """The first ``num_turned`` of the heads ``(T, ., d)``, each half by the other, in fp32."""
    half = heads.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = heads[:, :num_turned].float().split(half, dim=-1)
    turned = torch.empty_like(heads)
    turned[:, num_turned:] = heads[:, num_turned:]
    turned[:, :num_turned, :half] = (first * cos).addcmul_(second, sin, value=-1)
    turned[:, :num_turned, half:] = (second * cos).addcmul_(first, sin)
    return turned


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` of ``(T, 2 F)``."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_and_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
        return out
