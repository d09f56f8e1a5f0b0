"""Experts nearer to their mean, before they are put together.

Networks fine-tuned from one start can be averaged, and the mean often generalises better than each
of them (model soups, arXiv 2203.05482). With a spread s expert j becomes
``mean + s (expert_j - mean)``: all keep the mean, and a share of what each alone has learnt is left
for a router to choose. A spread of 1 leaves them as they are, one of 0 makes them all the mean.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def spread_experts(experts: Sequence[State], spread: float) -> list[dict[str, Tensor]]:
    """Whole networks.

    Args:
        experts: E results of ``ffn_state_dict``.
        spread: s, 0 to 1.
    """
    if spread == 1:
        return [dict(expert) for expert in experts]
    mean = {name: torch.stack([one[name] for one in experts]).mean(0) for name in experts[0]}
    return [{name: mean[name].lerp(one[name], spread) for name in mean} for one in experts]


def spread_low_rank_experts(
    base: State, changes: Sequence[State], spread: float
) -> list[dict[str, Tensor]]:
    """Low-rank changes of one base, which is expert 0: the base takes what is common to all, so
    that the changes keep their rank.

    Args:
        base: Of ``ffn_state_dict``.
        changes: E - 1 states of :attr:`LowRankFFN.deltas`, ``<network>.`` before their names.
        spread: s, 0 to 1.

    Returns:
        The base ``W + (1 - s) mean_j(B_j A_j)``, then the changes ``s B_j A_j``.
    """
    if spread == 1:
        return [dict(one) for one in (base, *changes)]
    moved = dict(base)
    pulled = [dict(change) for change in changes]
    share = (1 - spread) / (1 + len(changes))
    for name in changes[0]:
        linear, _, kind = name.rpartition(".")
        if kind == "a":
            products = [one[f"{linear}.b"] @ one[name] for one in changes]
            moved[f"{linear}.weight"] = base[f"{linear}.weight"] + share * sum(products)
            continue
        if kind == "bias":
            moved[name] = base[name] + share * sum(one[name] for one in changes)
        for one in pulled:
            one[name] = spread * one[name]
    return [moved, *pulled]
