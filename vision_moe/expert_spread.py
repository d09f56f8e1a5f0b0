"""Experts nearer to the base and to their mean, before they are put together.

A model fine-tuned on one thing forgets others; between its weights and those it started from lies
one that forgets less and keeps most of the gain (WiSE-FT, arXiv 2109.01903). With a base share b
each expert first becomes ``base + (1 - b) (expert - base)``.

Networks fine-tuned from one start can be averaged, and the mean often generalises better than each
of them (model soups, arXiv 2203.05482). With a spread s expert j becomes
``mean + s (expert_j - mean)``: all keep the mean, and a share of what each alone has learnt is left
for a router to choose. A spread of 1 leaves them as they are, one of 0 makes them all the mean.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def spread_experts(
    experts: Sequence[State], spread: float, base_share: float = 0.0
) -> list[dict[str, Tensor]]:
    """Whole networks.

    Args:
        experts: E results of ``ffn_state_dict``, first the base; the others may lack networks that
            do not become experts, which stay the base's.
        spread: s, 0 to 1.
        base_share: b, 0 to 1.
    """
    base = experts[0]
    if base_share:
        experts = [{n: one[n].lerp(base[n], base_share) for n in one} for one in experts]
    if spread == 1:
        return [dict(expert) for expert in experts]
    shared = set(base).intersection(*experts)
    mean = {name: torch.stack([one[name] for one in experts]).mean(0) for name in shared}
    return [
        {name: mean[name].lerp(own, spread) if name in mean else own for name, own in one.items()}
        for one in experts
    ]


def spread_low_rank_experts(
    base: State, changes: Sequence[State], spread: float, base_share: float = 0.0
) -> list[dict[str, Tensor]]:
    """Low-rank changes of one base, which is expert 0: the base takes what is common to all, so
    that the changes keep their rank.

    Args:
        base: Of ``ffn_state_dict``.
        changes: E - 1 states of :attr:`LowRankFFN.deltas`, ``<network>.`` before their names.
        spread: s, 0 to 1.
        base_share: b, 0 to 1.

    Returns:
        With ``B_j`` scaled by ``1 - b``: the base ``W + (1 - s) mean_j(B_j A_j)``, then the changes
        ``s B_j A_j``.
    """
    if base_share:
        changes = [_scaled(change, 1 - base_share) for change in changes]
    if spread == 1:
        return [dict(one) for one in (base, *changes)]
    moved = dict(base)
    share = (1 - spread) / (1 + len(changes))
    for name in changes[0]:
        linear, _, kind = name.rpartition(".")
        if kind == "a":
            products = [one[f"{linear}.b"] @ one[name] for one in changes]
            moved[f"{linear}.weight"] = base[f"{linear}.weight"] + share * sum(products)
        elif kind == "bias":
            moved[name] = base[name] + share * sum(one[name] for one in changes)
    return [moved, *(_scaled(change, spread) for change in changes)]


def _scaled(change: State, factor: float) -> dict[str, Tensor]:
    """A low-rank change times a number: its ``b`` and biases are, its ``a`` is not."""
    return {n: one if n.endswith(".a") else factor * one for n, one in change.items()}
