"""What an upcycling would do, told before it runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from train.blocks import moe_config, rank_of_experts
from train.experts import attention_rates
from train.recipe import UpcycleRecipe
from vision_moe import (
    CLIPMoEConfig,
    CLIPMoEModel,
    InputError,
    LowRankExperts,
    find_ffns,
    moe_layers,
    open_clip_description,
    read_config,
)


@dataclass
class TowerSize:
    """Parameters of a tower: ``dense`` before, ``total`` after, ``active`` for one token."""

    name: str
    dense: int
    total: int
    active: int
    trained: int


def dense_model(recipe: UpcycleRecipe) -> CLIPMoEModel:
    """The model that the recipe starts from, as shapes alone: no weights are read or made."""
    config: CLIPMoEConfig
    if isinstance(recipe.model, dict):
        description = {key: value for key, value in recipe.model.items() if key != "preprocess"}
        config = CLIPMoEConfig(open_clip_config=description)
    elif Path(recipe.model).is_dir():
        config = read_config(recipe.model)
    else:
        description = open_clip_description(recipe.model, recipe.pretrained)
        config = CLIPMoEConfig(open_clip_config=description)
    try:
        with torch.device("meta"):
            return CLIPMoEModel(config)
    except InputError:
        raise
    except Exception as error:  # open_clip raises whatever a wrong value makes it stumble over
        raise InputError(f"'model': no CLIP can be built from it ({error})") from error


def describe_upcycling(recipe: UpcycleRecipe) -> str:
    """Every feed-forward network and what becomes of it, then the parameters, as a table."""
    dense = dense_model(recipe)
    moe = moe_config(recipe, dense)
    config = copy.deepcopy(dense.config)
    assert isinstance(config, CLIPMoEConfig)
    config.moe = moe
    with torch.device("meta"):
        sparse = CLIPMoEModel(config)
    rank = rank_of_experts(recipe)
    changes_train = recipe.experts == "low_rank"
    lines = [_plan(recipe)]
    lines += [_networks("image tower", dense.visual, moe["vision_layers"], moe, rank)]
    lines += [_networks("text tower", dense.text, moe["text_layers"], moe, rank)]
    sizes = [
        _size("image tower", dense.visual, sparse.visual, moe["vision_layers"], changes_train),
        _size("text tower", dense.text, sparse.text, moe["text_layers"], changes_train),
    ]
    for name in attention_rates(recipe, dense):
        sizes[0 if name.startswith("visual.") else 1].trained += dense.get_parameter(name).numel()
    whole = [sum(getattr(one, name) for one in sizes) for name in vars(sizes[0]) if name != "name"]
    rows = [*sizes, TowerSize("both", *whole)]
    header = ("parameters", "dense", "CLIP-MoE", "active for one token", "trained in a stage")
    cells = [(r.name, f"{r.dense:,}", f"{r.total:,}", f"{r.active:,}", f"{r.trained:,}")
             for r in rows]  # fmt: skip
    return "\n\n".join([*lines, _table([header, *cells])])


def _plan(recipe: UpcycleRecipe) -> str:
    """What trains, and for how long."""
    stages, steps = recipe.num_experts - 1, recipe.stage.steps
    total = stages * steps + recipe.router.steps
    if recipe.method == "direct":
        what = "all parameters" if recipe.direct_parameters == "all" else "the networks below"
        plan = f"direct: {what} of the dense CLIP train for {total:,} steps; it stays dense"
    elif recipe.method == "sparse":
        plan = f"sparse: copies of the base and their routers train for {total:,} steps"
    else:
        plan = (
            f"{recipe.method}: {stages} stages of {steps:,} steps, then {recipe.router.steps:,} of"
            " the routers"
        )
        if recipe.router.experts_lr is not None:
            plan += f" and the experts, these at {recipe.router.experts_lr:g}"
    if recipe.attention_lr is not None:
        plan += f"; the attention beside the networks trains, too, at {recipe.attention_lr:g}"
    return plan


def _networks(
    name: str, tower: nn.Module, layers: list[int], moe: dict[str, object], rank: int | None
) -> str:
    sites = find_ffns(tower)
    if not sites:
        return f"{name} ({type(tower).__name__}): no feed-forward network of one shape; stays dense"
    experts = f"{moe['num_experts']} experts, top-{moe['top_k']}"
    if rank is not None:
        experts += f", rank {rank}"
    header = (f"{name}: block", "network", "width", "hidden", "parameters", "becomes")
    rows = [
        (
            str(site.layer_index),
            site.name,
            f"{site.width:,}",
            f"{site.hidden_size:,}",
            f"{_count(site.module):,}",
            experts if site.layer_index in layers else "stays dense",
        )
        for site in sites
    ]
    return _table([header, *rows])


def _size(
    name: str, dense: nn.Module, sparse: nn.Module, layers: list[int], changes_train: bool
) -> TowerSize:
    total = _count(sparse)
    idle = sum(layer.num_idle_parameters() for layer in moe_layers(sparse).values())
    trained = sum(_count(site.module) for site in find_ffns(dense) if site.layer_index in layers)
    if changes_train:
        low_rank = [m for m in sparse.modules() if isinstance(m, LowRankExperts)]
        trained = sum(_count(experts.deltas) // (len(experts) - 1) for experts in low_rank)
    return TowerSize(name, _count(dense), total, total - idle, trained)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _table(rows: list[tuple[str, ...]]) -> str:
    """Columns in line; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    numbers = [rows[-1][i].replace(",", "").isdecimal() for i in range(len(widths))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    )
