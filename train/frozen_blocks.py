"""A language model's frozen blocks, for training below or beside them on a CPU.

The same function as transformers' own block under bf16 autocast, in fewer passes over memory:

weights    in bf16 once, not anew in every step; no weight has a gradient, no product computes one;
           what a mapped file holds of them in fp32 leaves the memory until it is used again
norms      one pass with the sum before them (:mod:`train.fused_passes`); their gains stand in the
           weights behind them; what the backward pass keeps is bf16
products   queries, keys and values are one, gate and up are one; so are their adapters; some of
           them in 8 bits, where asked for (:mod:`train.int8_products`)
attention  row by row (:mod:`train.row_attention`), turned to its positions on the way there
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
from train.fused_passes import add_and_normalize, normalize_backward, swiglu, swiglu_backward
from train.int8_products import RoundedWeight, rounded_linear
from train.row_attention import LineOfRows, attend
from train.sharding import weights_are_spread

_FORMAT = torch.bfloat16
# Of 0, 0.5, 0.75 and 1 the one with SmolLM2's gradients nearest to those in bf16.
_SMOOTHED, _LEAST_GAIN = 0.75, 1e-4
_KNOWN = (LlamaDecoderLayer, Qwen2DecoderLayer)
_READING = Lock()  # threads share a block (train.row_threads)


def use_frozen_blocks(language_model: PreTrainedModel, int8_products: bool = False) -> None:
    """Let blocks whose own weights are all frozen run as :class:`FrozenBlock`, in place.

    Without ``rows``, or not under bf16 autocast on a CPU, they compute what they did before. Blocks
    that run so already begin anew.

    Args:
        language_model: Of any kind.
        int8_products: See :class:`train.recipe.InstructionRecipe`.
    """
    layers: Any = language_model.layers
    for layer in layers:
        if type(layer) in _KNOWN:
            layer.forward = FrozenBlock(layer, layer is layers[-1], int8_products)


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

    def __init__(self, layer: Any, is_last: bool = False, int8_products: bool = False) -> None:
        self.layer = layer
        self.is_last = is_last
        self.int8_products = int8_products
        before = layer.forward
        self.stock: Callable[..., Tensor] = (
            before.stock if isinstance(before, FrozenBlock) else before
        )
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
        cos, sin = (one[0].float() for one in position_embeddings)               # (T, d)
        x, normed = _add_and_norm(hidden_states[0].float(), None, eps)
        heads = weights.heads(normed).unflatten(-1, (-1, cos.shape[-1]))         # (T, H + 2 K, d)
        mixed = attend(heads, num_heads, rows, attention.scaling, (cos, sin))    # (T, H, d)
        mixed = mixed.flatten(1)
        read = rows.read if self.is_last else None
        if read is not None:
            x, mixed = x.index_select(0, read), mixed.index_select(0, read)      # of M tokens
        x, normed = _add_and_norm(x, weights.output(mixed), eps)
        inner = _SwiGLU.apply(weights.gate_and_up(normed))                       # (T, F)
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
                self._weights = _Weights(self.layer, self.int8_products)
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

    def __init__(self, layer: Any, int8_products: bool) -> None:
        query, key, value, output, gate, up, down = _linear_layers(layer)
        before, between = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        int8 = int8_products
        self.heads = _Products([query, key, value], before, int8)
        self.output = _Products([output], None, int8)
        self.gate_and_up = _Products([gate, up], between, int8, int8_forward=int8)
        self.down = _Products([down], None, int8)


class _Products:
    """Linear layers that read the same, as one product, and their adapters as another.

    Args:
        layers: As said.
        gain: ``(in,)``, of the norm before them.
        int8: Gradients pass their own weights rounded to 8 bits.
        int8_forward: So do their inputs.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        gain: Tensor | None,
        int8: bool,
        int8_forward: bool = False,
    ) -> None:
        self.layers = layers
        self.gain = gain
        plain = [getattr(layer, "base_layer", layer) for layer in layers]
        whole = [layer.weight.detach() for layer in plain]
        if gain is not None:
            whole = [one.float() * gain.detach().float() for one in whole]
        self.weight: Tensor | None = None
        self.rounded: RoundedWeight | None = None
        if int8:
            smoothing = None if gain is None else _smoothing(gain.detach().float())
            self.rounded = RoundedWeight(torch.cat(whole), smoothing)
        if not int8_forward:
            halves = [one.to(_FORMAT) for one in whole]
            self.weight = halves[0] if len(halves) == 1 else torch.cat(halves)  # (out, in)
        biased = any(layer.bias is not None for layer in plain)
        self.bias = torch.cat([_bias_of(layer) for layer in plain]).to(_FORMAT) if biased else None

    def __call__(self, x: Tensor) -> Tensor:
        """``(T, in)`` to ``(T, out)``, the layers' results side by side."""
        if self.rounded is None:
            assert self.weight is not None
            product = F.linear(x, self.weight, self.bias)
        else:
            product = rounded_linear(x, self.rounded, self.weight)
            product = product if self.bias is None else product + self.bias
        if all(type(layer) is nn.Linear for layer in self.layers):
            return product
        adapters = [_adapter_of(layer) for layer in self.layers]
        down = torch.cat([one for one, _ in adapters])                     # (ranks, in)
        if self.gain is not None:
            down = down * self.gain
        up = torch.block_diag(*(one for _, one in adapters))               # (out, ranks)
        return torch.addmm(product, F.linear(x, down.to(_FORMAT)), up.to(_FORMAT).t())


def _smoothing(gain: Tensor) -> Tensor:
    """By a norm's gains ``(in,)``: where they are small, what it gives is large."""
    return gain.abs().clamp(min=_LEAST_GAIN) ** -_SMOOTHED


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


def _add_and_norm(x: Tensor, update: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` and what is added to it, fp32, and that divided by its root mean square, bf16."""
    total, normed = _AddAndNorm.apply(x, update, eps)
    return total, normed


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, scale = add_and_normalize(x, update, eps)
        ctx.save_for_backward(normed, scale)
        ctx.has_update = update is not None
        return total if ctx.has_update else x.view_as(x), normed

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor, grad_normed: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        grad, half = normalize_backward(
            grad_normed, *ctx.saved_tensors, grad_total, ctx.has_update
        )
        return grad, half if ctx.has_update else None, None


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` of ``(T, 2 F)``."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        inner: Tensor = swiglu(gate_and_up)
        return inner

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        grads: Tensor = swiglu_backward(grad, gate_and_up)
        return grads
