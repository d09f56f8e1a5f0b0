"""Which blocks of a CLIP become mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from train.recipe import UpcycleRecipe
from vision_moe import CLIPMoEModel, FFNSite, InputError, RouterOptions, find_ffns


def chosen_blocks(choice: str | Sequence[int], tower: nn.Module) -> list[int]:
    """The blocks of a tower that ``choice`` stands for, numbered as ``find_ffns`` does.

    Args:
        choice: see :class:`train.recipe.UpcycleRecipe`.
        tower: dense.
    """
    numbers = [site.layer_index for site in find_ffns(tower)]
    half = len(numbers) // 2
    if not isinstance(choice, str):
        if unknown := sorted(set(choice) - set(numbers)):
            raise InputError(
                f"block(s) {unknown} have no feed-forward network in {type(tower).__name__}:"
                f" it has {len(numbers)} of them, from 0"
            )
        return sorted(set(choice))
    named = {
        "all": numbers,
        "none": [],
        "every_second": numbers[1::2],
        "second_half": numbers[half:],
        "odd_second_half": [number for number in numbers[half:] if number % 2],
    }
    return named[choice] if choice in named else numbers[-int(choice.removeprefix("last_")) :]


def router_options(recipe: UpcycleRecipe) -> RouterOptions:
    """The router that the recipe asks for."""
    router = recipe.router
    kinds: dict[str, Any] = {"trained": "linear", "random": "linear", "training_free": "spectral"}
    return RouterOptions(
        kind=kinds.get(router.kind, router.kind),
        rank=router.spectral_rank,
        expert_bias=router.bias_rate > 0,
        base_gate=router.base_gate,
    )


def rank_of_experts(recipe: UpcycleRecipe) -> int | None:
    """Of the changes that the experts are in the end; ``None``: they are whole networks."""
    return None if recipe.experts == "full" else recipe.rank


def moe_config(recipe: UpcycleRecipe, model: CLIPMoEModel) -> dict[str, Any]:
    """``CLIPMoEConfig.moe`` of what the recipe makes of a dense model.

    Raises:
        InputError: the model is no dense one, or nothing of it becomes a mixture.
    """
    if model.config.moe is not None:
        raise InputError(
            f"{recipe.model}: a mixture of experts already; only a dense CLIP is upcycled"
        )
    num_routed = recipe.num_experts - router_options(recipe).base_gate
    if recipe.top_k > num_routed:
        beside = " beside the base" if num_routed < recipe.num_experts else ""
        raise InputError(f"'top_k' is {recipe.top_k}, but there are {num_routed} experts{beside}")
    if recipe.experts != "full" and recipe.method == "sparse":
        raise InputError("'method: sparse' copies whole networks; its 'experts' must be 'full'")
    if recipe.router.base_gate and (recipe.experts == "truncated" or recipe.expert_spread < 1):
        raise InputError(
            "'router.base_gate' needs the base among the experts: 'expert_spread' must be 1, and"
            " 'experts' not 'truncated'"
        )
    if recipe.clusters == "parallel" and recipe.method in ("dmu", "shuffled_labels"):
        if recipe.cluster_modality == "both":
            raise InputError("'clusters: parallel' needs 'cluster_modality: image' or 'text'")
        if recipe.num_clusters != recipe.num_experts - 1:
            raise InputError(
                f"'clusters: parallel' makes an expert of each cluster, beside the base:"
                f" 'num_clusters' is {recipe.num_clusters}, 'num_experts' {recipe.num_experts}"
            )
    one_after_another = recipe.clusters == "sequential" and recipe.stage_init == "previous"
    if recipe.attention_lr is not None and (recipe.method == "seeds" or not one_after_another):
        raise InputError(
            "'attention_lr' needs stages that go on from one another, which share an attention:"
            " 'method: seeds', 'clusters: parallel' and 'stage_init: base' start each from the base"
        )
    vision = chosen_blocks(recipe.vision_blocks, model.visual)
    text = chosen_blocks(recipe.text_blocks, model.text)
    if not vision and not text:
        raise InputError(
            f"none of the chosen blocks has a feed-forward network: {type(model.visual).__name__}"
            f" ('vision_blocks: {recipe.vision_blocks}') has {len(find_ffns(model.visual))},"
            f" {type(model.text).__name__} ('text_blocks: {recipe.text_blocks}')"
            f" {len(find_ffns(model.text))}"
        )
    moe: dict[str, Any] = {
        "num_experts": recipe.num_experts,
        "top_k": recipe.top_k,
        "vision_layers": vision,
        "text_layers": text,
    }
    if (options := router_options(recipe)) != RouterOptions():
        moe["router"] = asdict(options)
    if (rank := rank_of_experts(recipe)) is not None:
        moe |= {f"{t}_ranks": [rank] * len(moe[f"{t}_layers"]) for t in ("vision", "text")}
    return moe


def expert_sites(recipe: UpcycleRecipe, model: CLIPMoEModel) -> list[FFNSite]:
    """The feed-forward networks that become experts, named from the whole model."""
    moe = moe_config(recipe, model)
    sites = []
    for tower, layers in (("visual", moe["vision_layers"]), ("text", moe["text_layers"])):
        for site in find_ffns(model.get_submodule(tower)):
            if site.layer_index in layers:
                sites.append(FFNSite(f"{tower}.{site.name}", site.module, site.layer_index))
    return sites
