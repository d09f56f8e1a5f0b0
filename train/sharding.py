"""Weights that are spread over processes (FSDP2): in what units, and as whole tensors in a file."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def weights_are_spread() -> bool:
    """Whether they are, once the run has begun; whole only while their own module runs."""
    return any(os.environ.get(name) == "true" for name in _SHARDED)


def name_units(model: nn.Module) -> None:
    """Let accelerate gather the weights of a block at a time, of language model and tower.

    Every model of transformers' names its blocks; what wraps several names none. A name that no
    module bears, such as that of a text tower's part, is an error to accelerate.
    """
    named = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = sorted(named & present)  # type: ignore[assignment]


def spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, the same on every process, as the parameter is spread."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device_mesh.device_type)
    # Each takes its own part of what it has: nothing is sent.
    return distribute_tensor(
        value, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def whole_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """The state that the optimiser would have on one process. All processes must call this.

    Args:
        optimizer: Of spread parameters.
        keep: Whether this process wants it; it is empty otherwise.
    """
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for number, values in whole["state"].items():
        gathered = {
            name: value.full_tensor().cpu() if isinstance(value, DTensor) else value
            for name, value in values.items()
        }
        if keep:
            state[number] = gathered
    return {**whole, "state": state}


def load_whole_optimizer_state(
    optimizer: torch.optim.Optimizer, whole: dict[str, Any]
) -> None:
    """Take up what :func:`whole_optimizer_state` gave, or an optimiser on one process."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    state = {
        number: {
            name: spread_like(parameters[number], value)
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in whole["state"].items()
    }
    optimizer.load_state_dict({**whole, "state": state})
