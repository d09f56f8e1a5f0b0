"""How the experts of a token are chosen: the options of a router, and one that needs no training.

T tokens, D width, E experts, R directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vision_moe.errors import InputError
from vision_moe.feed_forward import split_ffn
from vision_moe.low_rank import LowRankDelta, LowRankExperts


@dataclass(frozen=True)
class RouterOptions:
    """What ``CLIPMoEConfig.moe["router"]`` says beside the defaults.

    Attributes:
        kind: ``linear``; ``spectral``: how much of a token lies in the leading directions of an
            expert's weights, without training (after SSMoE, arXiv 2605.30992); ``uniform``: all
            experts mixed evenly, the control.
        rank: R of ``spectral``.
        expert_bias: add to the logits, for the choice alone, a number for each expert that keeps
            their loads even (loss-free balancing, arXiv 2408.15664, there with sigmoid scores).
        base_gate: keep expert 0 always on, ``G base + (1 - G) (what is routed)``, G of each token
            (CLIP-FMoE); the router then chooses among the others.
    """

    kind: Literal["linear", "spectral", "uniform"] = "linear"
    rank: int = 8
    expert_bias: bool = False
    base_gate: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "spectral", "uniform"):
            raise InputError(f"router kind {self.kind!r} is not linear, spectral or uniform")
        if self.rank < 1:
            raise InputError(f"a spectral router's rank is {self.rank}, it must be at least 1")
        if self.kind == "uniform" and (self.base_gate or self.expert_bias):
            raise InputError("a uniform router chooses nothing: no base gate, no expert bias")


#: Linear and trained, as the paper's.
DEFAULT_ROUTER = RouterOptions()


class SpectralRouter(nn.Linear):
    """``x -> |V_e x|`` for each expert e, V_e its leading right singular vectors.

    Args:
        width: D.
        num_experts: E.
        rank: R.
    """

    def __init__(self, width: int, num_experts: int, rank: int) -> None:
        super().__init__(width, num_experts * min(rank, width), bias=False)
        self.num_experts = num_experts

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., E)``"""
        return super().forward(x).unflatten(-1, (self.num_experts, -1)).norm(dim=-1)

    @torch.no_grad()
    def fit(self, experts: Sequence[nn.Module] | LowRankExperts) -> None:
        """Take the directions from the experts' first layers; the last E of them, if the base is
        not routed to."""
        first = len(experts) - self.num_experts
        rank = self.out_features // self.num_experts
        vectors = [
            _right_singular_vectors(_up_weight(experts, index), rank)
            for index in range(first, len(experts))
        ]
        self.weight.copy_(torch.cat(vectors))


def _up_weight(experts: Sequence[nn.Module] | LowRankExperts, index: int) -> Tensor:
    """``(H, D)``, of gate and value one below the other."""
    ffn = experts.base if isinstance(experts, LowRankExperts) else experts[index]
    weights = []
    for name in split_ffn(ffn).ups:
        linear = ffn.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.float()
        if isinstance(experts, LowRankExperts) and index:
            delta = experts.deltas[name]
            assert isinstance(delta, LowRankDelta)
            weight = weight + delta.b[index - 1].float() @ delta.a[index - 1].float()
        weights.append(weight)
    return torch.cat(weights)


def _right_singular_vectors(weight: Tensor, rank: int) -> Tensor:
    """The leading ones, ``(R, D)``."""
    # D x D, whatever H: its eigenvalues come in ascending order.
    _, vectors = torch.linalg.eigh(weight.T @ weight)
    return vectors[:, -rank:].T.flip(0)
