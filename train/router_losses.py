"""Auxiliary losses of the routers that take part in a training step, and what to plot of them.

B rows, L tokens, T tokens in all, E experts, K top-k.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from train.parts import TrainableParts, router_names
from train.recipe import InstructionRecipe
from vision_moe import load_balancing_loss, moe_layers, record_routing


def router_z_loss(logits: Tensor) -> Tensor:
    """``mean over tokens of logsumexp(logits)²`` (ST-MoE, arXiv 2202.08906), in fp32.

    Args:
        logits: ``(..., E)``.
    """
    return logits.float().logsumexp(-1).square().mean()


@dataclass(frozen=True)
class RouterSettings:
    """Weights of the losses, and whose routers they are for.

    Attributes:
        balance: Of the balance loss of ``layers``.
        z: Of their z-loss.
        layers: MoE layers of tower and connector, by qualified name in the LLaVA model.
        llm_balance: Of the language model's own balance loss; none without.
    """

    balance: float = 0.0
    z: float = 0.0
    layers: tuple[str, ...] = ()
    llm_balance: float | None = None


def router_settings(
    recipe: InstructionRecipe, model: LlavaForConditionalGeneration, parts: TrainableParts
) -> RouterSettings:
    """What the recipe's trained parts call for.

    A block takes part if something that it depends on trains: a router that is frozen still tells
    the layers before it how evenly they are served.
    """
    trainable = recipe.trainable
    prefixes = ["model.vision_tower."] if trainable.tower_trains else []
    if trainable.connector.mode != "frozen":
        prefixes.append("model.multi_modal_projector.")
    layers = [
        name
        for name in moe_layers(model)
        if name.startswith(tuple(prefixes)) and f"{name}.router.weight" not in parts.unread
    ]
    llm_balance = None
    trains = {trainable.llm.mode, trainable.llm_router.mode} != {"frozen"}
    if trains and router_names(model.model.language_model):
        stated = float(getattr(model.config.text_config, "router_aux_loss_coef", 0.0))
        llm_balance = stated if recipe.llm_balance is None else recipe.llm_balance
    return RouterSettings(recipe.balance, recipe.router_z, tuple(layers), llm_balance)


class RouterLosses:
    """Computes the losses of one forward pass after another, and adds up what there is to plot."""

    def __init__(
        self, model: LlavaForConditionalGeneration, settings: RouterSettings | None = None
    ) -> None:
        self.settings = settings or RouterSettings()
        self.llm_arguments: dict[str, Any] = {}
        if self.settings.llm_balance is not None:
            self.llm_arguments["output_router_logits"] = True
        self._text_config: Any = model.config.text_config
        self._llm_class: type = type(model.model.language_model)
        self._labels = _short_names(self.settings.layers)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Collect the router logits ``(..., E)`` of the settings' layers while the block lasts."""
        watched: dict[str, Tensor] = {}
        if not self.settings.layers:
            yield watched
            return
        with record_routing(model) as record:
            yield watched
        for name in self.settings.layers:
            watched[name] = record.router_logits[name]
        self._top_k = record.top_k

    def __call__(
        self,
        watched: dict[str, Tensor],
        llm_output: Any,
        is_token: Tensor,
        has_pictures: bool = True,
    ) -> Tensor | None:
        """The weighted sum of all losses; none where no router takes part.

        Args:
            watched: What :meth:`watch` gave.
            llm_output: The language model's.
            is_token: ``(B, L)``, false at padding.
            has_pictures: Otherwise what tower and connector saw does not count.
        """
        terms = []
        if watched and has_pictures:
            balance = load_balancing_loss(watched.values())
            z = torch.stack([router_z_loss(logits) for logits in watched.values()]).mean()
            terms += [self.settings.balance * balance, self.settings.z * z]
            self._add("balance_loss", balance)
            self._add("router_z_loss", z)
            for name, logits in watched.items():
                self._add_load(self._labels[name], logits, self._top_k[name])
        elif watched:
            terms += [0.0 * logits.sum() for logits in watched.values()]
        if self.settings.llm_balance is not None:
            terms.append(self.settings.llm_balance * self._llm_loss(llm_output, is_token))
        if not terms:
            return None
        return torch.stack(terms).sum()

    def _llm_loss(self, llm_output: Any, is_token: Tensor) -> Tensor:
        """The loss that the language model's own class adds, from its own function."""
        config = self._text_config
        num_experts = getattr(config, "num_local_experts", None) or config.num_experts
        compute = sys.modules[self._llm_class.__module__].load_balancing_loss_func
        loss: Tensor = compute(
            llm_output.router_logits, num_experts, config.num_experts_per_tok, is_token
        )
        self._add("llm_balance_loss", loss)
        for number, logits in enumerate(llm_output.router_logits):
            seen = logits.reshape(-1, logits.shape[-1])[is_token.reshape(-1)]
            self._add_load(f"llm_{number}", seen, config.num_experts_per_tok)
        return loss

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._counts[name] = self._counts.get(name, 0) + 1

    def _add_load(self, block: str, logits: Tensor, top_k: int) -> None:
        chosen = logits.detach().topk(top_k, dim=-1).indices.reshape(-1)
        experts = torch.arange(logits.shape[-1], device=chosen.device).unsqueeze(1)
        counts = (chosen == experts).sum(1)
        self._add(f"router_load/{block}", counts / max(1, chosen.numel()))

    def pop_curves(self) -> dict[str, float]:
        """Means since the last call: ``balance_loss``, ``router_load/vision_0/expert_0``, ..."""
        curves: dict[str, float] = {}
        for name, total in self._sums.items():
            mean: Any = (total / self._counts[name]).tolist()
            if isinstance(mean, list):
                curves |= {f"{name}/expert_{number}": load for number, load in enumerate(mean)}
            else:
                curves[name] = mean
        self._sums, self._counts = {}, {}
        return curves


def _short_names(layers: tuple[str, ...]) -> dict[str, str]:
    """``vision_0``, ``vision_1``, ..., ``connector_0``: by part, in order."""
    short: dict[str, str] = {}
    for part, prefix in (("vision", "model.vision_tower."), ("connector", "model.multi")):
        for number, name in enumerate(one for one in layers if one.startswith(prefix)):
            short[name] = f"{part}_{number}"
    return short
