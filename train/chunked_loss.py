"""Cross-entropy of a language model's head, in chunks: no full logits tensor.

M labelled tokens, D width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_CHUNK = 256


def summed_loss(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The sum over the tokens.

    Args:
        lm_head: Makes the logits.
        hidden: ``(M, D)``.
        labels: ``(M,)``.
    """
    plain: Any = lm_head if type(lm_head) is nn.Linear else None
    if plain is not None and plain.bias is None and not plain.weight.requires_grad:
        loss: Tensor = _FrozenHeadLoss.apply(hidden, plain.weight, labels)
        return loss
    chunks = zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True)
    # Logits are computed again in the backward pass, so that one chunk of them exists at a time.
    return torch.stack(
        [checkpoint(_cross_entropy, lm_head, h, y, use_reentrant=False) for h, y in chunks]
    ).sum()


def _cross_entropy(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = lm_head(hidden)
    return F.cross_entropy(logits.to(torch.float32), labels, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The head has no gradient of its own, so that a chunk's logits give at once what its hidden
    states' gradient is; none is computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            weight = weight.to(torch.get_autocast_dtype(kind))
        grad = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for h, y, out in zip(
            hidden.split(_CHUNK), labels.split(_CHUNK), grad.split(_CHUNK), strict=True
        ):
            logits = F.linear(h.to(weight.dtype), weight).float()
            normalizer = logits.logsumexp(-1, keepdim=True)  # (chunk, 1)
            total += (normalizer - logits.gather(1, y[:, None])).sum()
            if ctx.needs_input_grad[0]:
                of_logits = logits.sub_(normalizer).exp_()
                of_logits.scatter_add_(1, y[:, None], of_logits.new_full((len(y), 1), -1))
                out.copy_(of_logits.to(weight.dtype) @ weight)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total, None, None
