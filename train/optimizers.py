"""AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from train.recipe import ContrastiveTraining

_BETAS = (0.9, 0.98)  # as CLIP and open_clip


class CombinedOptimizer(Optimizer):
    """Several optimisers that step as one and share one list of parameter groups.

    Args:
        optimizers: Each with parameters of its own.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        # The very dictionaries of the members: a schedule that sets a rate here sets it there.
        super().__init__([group for one in optimizers for group in one.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for one in self.optimizers:
            one.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for one, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            one.load_state_dict(state)
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    training: ContrastiveTraining,
    rates: Mapping[str, float] | None = None,
) -> Optimizer:
    """The optimiser of a contrastive run, over the parameters that train.

    Norms, biases and the temperature do not decay (as in open_clip).

    Args:
        named_parameters: Of the model; frozen ones are left out.
        training: ``optimizer``, ``lr`` and ``weight_decay``.
        rates: Of parameters, by name, whose rate is not ``lr``.
    """
    muon: dict[float, list[nn.Parameter]] = {training.lr: []}
    matrices: dict[float, list[nn.Parameter]] = {training.lr: []}
    vectors: dict[float, list[nn.Parameter]] = {training.lr: []}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        of_muon = training.optimizer == "muon" and is_block_matrix(name, parameter)
        rest = matrices if parameter.ndim >= 2 else vectors
        rate = (rates or {}).get(name, training.lr)
        (muon if of_muon else rest).setdefault(rate, []).append(parameter)
    members: list[Optimizer] = []
    if groups := _groups(matrices, training.weight_decay) + _groups(vectors, 0.0):
        members.append(torch.optim.AdamW(groups, lr=training.lr, betas=_BETAS, fused=True))
    if groups := _groups(muon, training.weight_decay):
        members.append(
            torch.optim.Muon(
                groups,
                lr=training.lr,
                adjust_lr_fn="match_rms_adamw",  # so that one rate serves both
            )
        )
    return members[0] if len(members) == 1 else CombinedOptimizer(members)


def _groups(
    by_rate: Mapping[float, list[nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """The first, whose rate is logged, has the run's."""
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay}
        for rate, parameters in by_rate.items()
        if parameters
    ]


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix inside a numbered block: no embedding, no projection."""
    return parameter.ndim == 2 and any(part.isdecimal() for part in name.split("."))
