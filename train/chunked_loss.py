"""Cross-entropy of a language model's head, in chunks: no full logits tensor.

M labelled tokens, D width of the language model.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from train.sharding import weights_are_spread

_CHUNK = 128

# A frozen head in the format that autocast computes in, and what it was made of.
_heads: WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = WeakKeyDictionary()


def summed_loss(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The sum over the tokens.

    Args:
        lm_head: Makes the logits.
        hidden: ``(M, D)``.
        labels: ``(M,)``.
    """
    plain: Any = lm_head if type(lm_head) is nn.Linear else None
    if plain is not None and plain.bias is None and not plain.weight.requires_grad:
        loss: Tensor = _FrozenHeadLoss.apply(hidden, _frozen_weight(plain), labels)
        return loss
    chunks = zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True)
    # Logits are computed again in the backward pass, so that one chunk of them exists at a time.
    return torch.stack(
        [checkpoint(_cross_entropy, lm_head, h, y, use_reentrant=False) for h, y in chunks]
    ).sum()


def _frozen_weight(head: nn.Linear) -> Tensor:
    """As autocast would have it; on a CPU, where a step's time counts it, made once."""
    weight = head.weight.detach()
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind):
        return weight
    dtype = torch.get_autocast_dtype(kind)
    if kind != "cpu" or weights_are_spread():
        return weight.to(dtype)
    source = (id(head.weight), head.weight._version, dtype)
    if head not in _heads or _heads[head][0] != source:
        _heads[head] = (source, weight.to(dtype))
    return _heads[head][1]


def _cross_entropy(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = lm_head(hidden)
    return F.cross_entropy(logits.to(torch.float32), labels, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The head has no gradient of its own, so that a chunk's logits give at once what its hidden
    states' gradient is; none is computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        grad = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for h, y, out in zip(
            hidden.split(_CHUNK), labels.split(_CHUNK), grad.split(_CHUNK), strict=True
        ):
            logits = F.linear(h.to(weight.dtype), weight).float()
            logits.sub_(logits.amax(-1, keepdim=True))
            right = logits.gather(1, y[:, None])              # (chunk, 1)
            of_logits = logits.exp_()                         # in place: a chunk is large
            sums = of_logits.sum(-1, keepdim=True)
            total += (sums.log() - right).sum()
            if ctx.needs_input_grad[0]:
                of_logits.div_(sums)
                of_logits.scatter_add_(1, y[:, None], of_logits.new_full((len(y), 1), -1))
                out.copy_(of_logits.to(weight.dtype) @ weight)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total, None, None
