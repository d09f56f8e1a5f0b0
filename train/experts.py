"""What of a dense CLIP trains in a stage: its feed-forward networks, whole or as low-rank changes,
which are one expert, and on demand the attention beside them, which all experts share.

Names are those in the whole model; see :func:`vision_moe.upcycle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.blocks import expert_sites
from train.recipe import UpcycleRecipe
from vision_moe import (
    CLIPMoEModel,
    InputError,
    LowRankExperts,
    LowRankFFN,
    MoEFeedForward,
    attention_beside,
)

EXPERT_FILE = "expert.safetensors"
ATTENTION_FILE = "attention.safetensors"


def trained_networks(
    recipe: UpcycleRecipe, model: CLIPMoEModel, seed: int = 0
) -> dict[str, nn.Module]:
    """What trains in a stage, by the name of its feed-forward network: the network itself, or the
    changes of a :class:`LowRankFFN`, which is put in its place unless one is there.

    Args:
        recipe: ``experts``, ``rank`` and the blocks.
        model: changed in place.
        seed: of new changes' first factors.
    """
    generator = torch.Generator().manual_seed(seed)
    networks: dict[str, nn.Module] = {}
    for site in expert_sites(recipe, model):
        networks[site.name] = site.module
        if recipe.experts == "low_rank":
            low_rank = site.module
            if not isinstance(low_rank, LowRankFFN):
                low_rank = LowRankFFN(low_rank, recipe.rank, generator)
                model.set_submodule(site.name, low_rank)
            networks[site.name] = low_rank.deltas
    return networks


def expert_state(recipe: UpcycleRecipe, model: CLIPMoEModel) -> dict[str, Tensor]:
    """A copy of the weights that trained: one expert."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, network in trained_networks(recipe, model).items()
        for key, value in network.state_dict().items()
    }


def load_expert(
    recipe: UpcycleRecipe, model: CLIPMoEModel, state: Mapping[str, Tensor]
) -> CLIPMoEModel:
    """Make a dense model the one of a stage, in place."""
    for name, network in trained_networks(recipe, model).items():
        prefix = f"{name}."
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
    return model


def attention_rates(recipe: UpcycleRecipe, model: CLIPMoEModel) -> dict[str, float]:
    """The rate of every parameter of the attention that trains beside the networks, by name; none
    by default.

    Args:
        recipe: ``attention_lr`` and the blocks.
        model: dense.

    Raises:
        InputError: It is to train, and there is none.
    """
    rate = recipe.attention_lr
    if rate is None:
        return {}
    rates = {
        f"{name}.{key}": rate
        for site in expert_sites(recipe, model)
        for name, attention in attention_beside(model, site).items()
        for key, _ in attention.named_parameters()
    }
    if not rates:
        raise InputError("'attention_lr': the blocks that become mixtures have no attention")
    return rates


def rates_beside_routers(
    recipe: UpcycleRecipe, layers: Mapping[str, MoEFeedForward], attention: Mapping[str, float]
) -> dict[str, float]:
    """The rate of every parameter that trains with the routers, by name: of the experts, low-rank
    ones' changes alone, and of the attention. Of all in sparse upcycling, and where
    ``router.experts_lr`` says so.

    Args:
        recipe: ``method`` and rates.
        layers: of the CLIP-MoE, by name.
        attention: :func:`attention_rates` of the dense model.
    """
    rate = recipe.stage.lr if recipe.method == "sparse" else recipe.router.experts_lr
    if rate is None:
        return {}
    rates = {name: lr * (rate / recipe.stage.lr) for name, lr in attention.items()}
    for name, layer in layers.items():
        part = "experts.deltas" if isinstance(layer.experts, LowRankExperts) else "experts"
        for key, _ in layer.get_submodule(part).named_parameters():
            rates[f"{name}.{part}.{key}"] = rate
    return rates


def save_stage(recipe: UpcycleRecipe, model: CLIPMoEModel, folder: Path) -> None:
    """Write what trained in a stage."""
    save_file(expert_state(recipe, model), folder / EXPERT_FILE)
    if rates := attention_rates(recipe, model):
        weights = {name: model.get_parameter(name).detach().clone() for name in rates}
        save_file(weights, folder / ATTENTION_FILE)


def load_stage(recipe: UpcycleRecipe, model: CLIPMoEModel, folder: Path) -> CLIPMoEModel:
    """Make a dense model the one of the stage that stands in ``folder``, in place."""
    load_attention(recipe, model, folder)
    return load_expert(recipe, model, load_file(folder / EXPERT_FILE))


def load_attention(recipe: UpcycleRecipe, model: CLIPMoEModel, folder: Path) -> None:
    """Give a dense model the attention of a stage, in place, where stages train it."""
    rates = attention_rates(recipe, model)
    weights = load_file(folder / ATTENTION_FILE) if rates else {}
    with torch.no_grad():
        for name in rates:
            model.get_parameter(name).copy_(weights[name])
