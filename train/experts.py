"""The networks of a dense CLIP that train in a stage, whole or as low-rank changes: one expert.

Names are those of the feed-forward networks in the whole model; see
:func:`vision_moe.upcycle`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.blocks import expert_sites
from train.recipe import UpcycleRecipe
from vision_moe import CLIPMoEModel, LowRankFFN


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
