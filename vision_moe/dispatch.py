"""How tokens reach their experts: the one place that knows.

T tokens in all, D width, E experts, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision_moe.low_rank import LowRankExperts


@dataclass(frozen=True)
class Groups:
    """The T*K (token, expert) pairs, one group for each expert.

    ``tokens``: the numbers of its tokens ``(T_e,)``; ``weights``: their weights ``(T_e, 1)``.
    Experts without a token have an empty group: they stay in the graph with zero gradients, and
    data-parallel training does not wait for them forever.
    """

    tokens: Sequence[Tensor]
    weights: Sequence[Tensor]


def group_by_expert(weights: Tensor, chosen: Tensor, num_experts: int) -> Groups:
    """Group the tokens ``(T, K)`` by the experts that they chose."""
    flat = chosen.reshape(-1)                                               # (T*K,)
    order = flat.argsort(stable=True)
    token = order.div(chosen.shape[-1], rounding_mode="floor")
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    sorted_weights = weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    return Groups(token.split(counts), sorted_weights.split(counts))


def dispatch(
    experts: nn.ModuleList | LowRankExperts, x: Tensor, weights: Tensor, chosen: Tensor
) -> Tensor:
    """Send each token to its experts, and mix what they answer.

    Args:
        experts: E of them.
        x: ``(T, D)``.
        weights: ``(T, K)``, each row summing to one.
        chosen: ``(T, K)``, numbers of experts.

    Returns:
        ``(T, D)``, in the precision that an expert answers in.
    """
    groups = group_by_expert(weights, chosen, len(experts))
    if isinstance(experts, LowRankExperts):
        return experts.mix(x, groups.tokens, groups.weights)
    outputs = [
        expert(x.index_select(0, token))
        for expert, token in zip(experts, groups.tokens, strict=True)
    ]
    grouped = torch.cat(outputs)                                            # (T*K, D)
    scale = torch.cat(list(groups.weights)).to(grouped.dtype)
    mixed = grouped.new_zeros(x.shape[0], grouped.shape[-1])
    return mixed.index_add(0, torch.cat(list(groups.tokens)), grouped * scale)


def run_expert(experts: nn.ModuleList | LowRankExperts, index: int, x: Tensor) -> Tensor:
    """``(T, D) -> (T, D)`` by one expert alone."""
    if isinstance(experts, LowRankExperts):
        return experts.expert(index, x)
    return experts[index](x)
