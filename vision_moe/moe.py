"""Top-k routed feed-forward layer and its balance loss (CLIP-MoE, arXiv 2409.19291).

B batch, L tokens of a sequence, T tokens in all, D width, E experts, K top-k.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_moe.errors import InputError


class MoEFeedForward(nn.Module):
    """Drop-in for a block's feed-forward network: E of them, of which K serve each token.

    Args:
        experts: the model's own feed-forward modules, each mapping ``(T, D)`` to ``(T, D)``.
        width: D.
        top_k: K, from 1 to E.
        generator: draws the router's weights; torch's global one by default.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        width: int,
        top_k: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= len(experts):
            raise InputError(f"top_k is {top_k}, it must be from 1 to the {len(experts)} experts")
        self.width = width
        self.top_k = top_k
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(width, len(experts), bias=False)
        # nn.Linear's own distribution, drawn again so that a seed can be given. Features reach the
        # router normalised, so its logits start with a standard deviation of about 0.6.
        nn.init.uniform_(self.router.weight, -(width**-0.5), width**-0.5, generator=generator)
        self.fixed_mixture: tuple[float, ...] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    def __getattr__(self, name: str) -> Any:
        """Parts of the feed-forward network that was replaced are those of expert 0.

        open_clip asks a block for ``mlp.c_fc.weight.dtype`` to know its precision.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self.__dict__.get("_modules", {}).get("experts")
            if experts and (name in experts[0]._modules or name in experts[0]._parameters):
                return getattr(experts[0], name)
            raise

    def forward(self, x: Tensor) -> Tensor:
        """Send each token to its top-k experts and mix their outputs.

        Args:
            x: ``(..., D)`` token features.

        Returns:
            ``(..., D)``, in the precision that an expert answers in.
        """
        logits = self._router_logits(x)                                    # (..., E)
        tokens = x.reshape(-1, x.shape[-1])                                # (T, D)
        if self.fixed_mixture is None:
            weights, chosen = self.route(logits.reshape(-1, self.num_experts))
            mixed = self._dispatch(tokens, weights, chosen)
        else:
            mixed = self._mix_fixed(tokens, self.fixed_mixture)
        return mixed.reshape(*x.shape[:-1], mixed.shape[-1])

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token.

        Args:
            logits: ``(T, E)``.

        Returns:
            fp32 weights ``(T, K)``, each row summing to one, and the experts' numbers ``(T, K)``.
        """
        probs = logits.softmax(-1, dtype=torch.float32)        # fp32: a bf16 softmax is coarse
        weights, chosen = probs.topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def _router_logits(self, x: Tensor) -> Tensor:
        # Outside autocast: in bf16 two experts often tie, and the choice would be by number.
        weight = self.router.weight
        with torch.autocast(x.device.type, enabled=False):
            return self.router(x.to(weight.dtype) if weight.is_floating_point() else x)

    def _dispatch(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Group the T*K (token, expert) pairs by expert, so that each expert runs once.

        Args:
            x: ``(T, D)``.
            weights: ``(T, K)``.
            chosen: ``(T, K)``.

        Returns:
            ``(T, D)``.
        """
        flat = chosen.reshape(-1)                                           # (T*K,)
        order = flat.argsort(stable=True)
        token = order.div(self.top_k, rounding_mode="floor")
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        # Experts without a token run on an empty slice: they stay in the graph with zero
        # gradients, and data-parallel training does not wait for them forever.
        outputs = [
            expert(group)
            for expert, group in zip(
                self.experts, x.index_select(0, token).split(counts), strict=True
            )
        ]
        grouped = torch.cat(outputs)                                        # (T*K, D)
        scale = weights.reshape(-1).index_select(0, order).to(grouped.dtype)
        mixed = grouped.new_zeros(x.shape[0], grouped.shape[-1])
        return mixed.index_add(0, token, grouped * scale.unsqueeze(-1))

    def _mix_fixed(self, x: Tensor, mixture: tuple[float, ...]) -> Tensor:
        outputs = [
            expert(x) if weight == 1.0 else weight * expert(x)
            for expert, weight in zip(self.experts, mixture, strict=True)
            if weight
        ]
        return torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0]

    def extra_repr(self) -> str:
        return f"width={self.width}, num_experts={self.num_experts}, top_k={self.top_k}"


def load_balancing_loss(router_logits: Iterable[Tensor]) -> Tensor:
    """``mean over blocks of E * sum_j f_j * P_j``: exactly 1 under uniform routing, E at worst.

    f_j is the share of a block's tokens whose first choice is expert j (a count: no gradient), P_j
    the mean router probability of expert j. Blocks are balanced one by one, never pooled: two
    blocks that each use one expert alone would look balanced together.

    Args:
        router_logits: one ``(..., E)`` tensor for each MoE block.

    Returns:
        A scalar in fp32.
    """
    losses = []
    for logits in router_logits:
        num_experts = logits.shape[-1]
        probs = logits.reshape(-1, num_experts).softmax(-1, dtype=torch.float32)      # (T, E)
        first = torch.bincount(probs.detach().argmax(-1), minlength=num_experts)
        share = first.to(probs.dtype) / probs.shape[0]
        losses.append(num_experts * (share * probs.mean(0)).sum())
    if not losses:
        raise ValueError("load_balancing_loss: no router logits; has the model MoE blocks?")
    return torch.stack(losses).mean()
