"""Watching and controlling the routers of a model.

B batch, L tokens of a sequence, E experts.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vision_moe.moe import MoEFeedForward


def moe_layers(model: nn.Module) -> dict[str, MoEFeedForward]:
    """The model's MoE layers by qualified name, in the order of the modules."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MoEFeedForward)
    }


@dataclass(eq=False)
class RoutingRecord:
    """What the routers said in the latest forward pass.

    ``router_logits`` maps the name of a MoE layer to ``(B, L, E)`` logits, in the graph when the
    forward pass was; ``top_k`` maps it to its K. A layer that has not run is absent.
    """

    router_logits: dict[str, Tensor] = field(default_factory=dict)
    top_k: dict[str, int] = field(default_factory=dict)

    def expert_load(self) -> dict[str, Tensor]:
        """For each layer the share ``(E,)`` of its K*T choices that fell on each expert."""
        loads = {}
        for name, logits in self.router_logits.items():
            chosen = logits.detach().topk(self.top_k[name], dim=-1).indices.reshape(-1)
            counts = torch.bincount(chosen, minlength=logits.shape[-1])
            loads[name] = counts.float() / max(chosen.numel(), 1)
        return loads


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the router logits of every MoE layer while the block lasts.

    Only forward passes of the calling thread are recorded, so that requests served side by side do
    not mix.
    """
    record = RoutingRecord()
    # A compiled forward pass is one thread's, and the tracer knows no threads.
    thread = None if torch.compiler.is_compiling() else threading.get_ident()
    layers = moe_layers(model)
    for name, layer in layers.items():
        record.top_k[name] = layer.top_k
        layer.listeners[record] = (thread, name)
    try:
        yield record
    finally:
        for layer in layers.values():
            del layer.listeners[record]


@contextmanager
def fixed_mixture(model: nn.Module, mixture: Sequence[float]) -> Iterator[None]:
    """Let every MoE layer return ``sum_j mixture[j] * expert_j(x)``, whatever its router says."""
    layers = list(moe_layers(model).values())
    for layer in layers:
        if len(mixture) != layer.num_experts or not any(mixture):
            raise ValueError(f"mixture {list(mixture)} for {layer.num_experts} experts")
    previous = [layer.fixed_mixture for layer in layers]
    try:
        for layer in layers:
            layer.fixed_mixture = tuple(float(weight) for weight in mixture)
        yield
    finally:
        for layer, mixture_before in zip(layers, previous, strict=True):
            layer.fixed_mixture = mixture_before


def _num_experts(model: nn.Module) -> int:
    return next((layer.num_experts for layer in moe_layers(model).values()), 1)


@contextmanager
def force_expert(model: nn.Module, expert: int) -> Iterator[None]:
    """Every token goes to one expert alone, in every MoE layer. No effect on a dense model."""
    num_experts = _num_experts(model)
    if not 0 <= expert < num_experts:
        raise ValueError(f"expert {expert} of {num_experts}: the first is 0")
    with fixed_mixture(model, [float(j == expert) for j in range(num_experts)]):
        yield


@contextmanager
def uniform_routing(model: nn.Module) -> Iterator[None]:
    """Every token goes to all experts with equal weight: the router has no say."""
    num_experts = _num_experts(model)
    with fixed_mixture(model, [1.0 / num_experts] * num_experts):
        yield


@contextmanager
def without_expert(model: nn.Module, expert: int) -> Iterator[None]:
    """No token goes to one of the experts, in every MoE layer: the next best takes its place."""
    num_experts = _num_experts(model)
    if not 0 <= expert < num_experts or num_experts < 2:
        raise ValueError(f"expert {expert} of {num_experts} cannot be left out")
    layers = moe_layers(model).values()
    # A base that is always on is none of the experts that the router numbers.
    number = expert - any(layer.base_gate is not None for layer in layers)
    if number < 0:
        raise ValueError("the base is always on in this model: it cannot be left out")

    def exclude(_module: nn.Module, _inputs: object, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(number, device=logits.device), -torch.inf)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.router.register_forward_hook(exclude).remove)
        yield
