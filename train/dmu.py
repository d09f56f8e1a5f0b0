"""Diversified multiplet upcycling: a dense CLIP becomes a CLIP-MoE (arXiv 2409.19291, section 3).

Stages 1 to N-1 of multistage contrastive learning each train the feed-forward networks on batches
from one accumulated cluster; the base's and every stage's networks become the experts; a router is
tuned with all else frozen (``router.experts_lr``: with the experts). The recipe's ``method`` runs
the baselines by the same code. Stages stand in ``<out>.stages`` and are not run again once whole.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train import stages
from train.blocks import expert_sites, moe_config, router_options
from train.contrastive import (
    LOG_FILE,
    check_patch_loss,
    configuration,
    model_inputs,
    start_model,
    train_contrastive,
    write_log,
    write_model,
)
from train.experts import (
    EXPERT_FILE,
    attention_rates,
    load_attention,
    load_stage,
    rates_beside_routers,
    save_stage,
    trained_networks,
)
from train.pair_batches import EpochBatches, cluster_batches, random_batches
from train.pair_labels import (
    LABEL_FILE,
    NEXT_LABEL_FILE,
    labels_of_next,
    labels_of_stage,
    read_labels,
)
from train.pair_sources import fingerprints
from train.pairs import Pairs, load_pairs, tell_of_skipped
from train.processes import processes
from train.recipe import RouterTraining, UpcycleRecipe
from train.stages import Stage, StageResult
from vision_moe import (
    CLIPMoEModel,
    ClusterBatchSampler,
    FeatureShards,
    InputError,
    MoEFeedForward,
    ffn_state_dict,
    moe_layers,
    num_occupied_clusters,
    spread_experts,
    spread_low_rank_experts,
    stretch_text_context,
    to_low_rank,
    upcycle,
)

#: Baselines of one run, without stages.
_NAMES = {"sparse": "sparse upcycling", "direct": "direct fine-tuning"}


def run(recipe: UpcycleRecipe) -> Path:
    """Upcycle, unless the recipe's folder holds the result already."""
    run_stage(recipe, "router tuning")
    return Path(recipe.out)


def run_stage(recipe: UpcycleRecipe, name: str) -> StageResult:
    """:func:`run` under a name; the time of the stages before is included."""
    mcl = mcl_stages(recipe)
    final = Stage(
        _NAMES.get(recipe.method, name),
        Path(recipe.out),
        configuration(recipe),
        # A baseline without stages rests on what they would rest on.
        [stage.fingerprint for stage in mcl] or _inputs(recipe),
    )
    if final.check():
        log = json.loads((final.folder / LOG_FILE).read_text(encoding="utf-8"))
        seconds = stages.run(final, _unreachable).seconds + log["seconds_of_stages"]
        return StageResult(final.fingerprint, seconds, skipped=True)
    base = start_model(recipe.model, recipe.pretrained, recipe.seed)
    if recipe.text_context is not None:
        stretch_text_context(base, recipe.text_context)
    # What it cannot be is told before anything trains.
    moe_config(recipe, base)
    attention_rates(recipe, base)
    check_patch_loss(base, recipe.stage, recipe.router)
    pairs = load_pairs(recipe.data, base, recipe.seed)
    before = 0.0
    for number, stage in enumerate(mcl):
        make = partial(train_stage, recipe, mcl, number, base, pairs)
        before += stages.run(stage, make).seconds
    if recipe.method == "direct":
        result = stages.run(final, partial(_fine_tune, recipe, final, base, pairs))
    else:
        assemble = partial(_assemble, recipe, mcl, final, base, pairs, before)
        result = stages.run(final, assemble)
    return StageResult(result.fingerprint, before + result.seconds, skipped=False)


def mcl_stages(recipe: UpcycleRecipe) -> list[Stage]:
    """Stages 1 to N-1, each resting on those before it; none of a baseline that has none."""
    if recipe.method in _NAMES:
        return []
    config = configuration(recipe)
    for later in ("router", "num_experts", "top_k", "expert_spread", "base_share"):
        config.pop(later)
    if recipe.experts != "low_rank":  # whatever becomes of them then, whole networks train
        config |= {"experts": "full", "rank": UpcycleRecipe.rank}
    inputs = _inputs(recipe)
    made: list[Stage] = []
    for number in range(1, recipe.num_experts):
        folder = Path(f"{recipe.out}.stages") / f"stage_{number}"
        made.append(Stage(f"contrastive stage {number}", folder, config, inputs))
        inputs = [made[-1].fingerprint]
    return made


def _inputs(recipe: UpcycleRecipe) -> list[str]:
    return [*model_inputs(recipe.model), *fingerprints(recipe.data)]


def train_stage(
    recipe: UpcycleRecipe,
    mcl: Sequence[Stage],
    number: int,
    base: CLIPMoEModel,
    pairs: Pairs,
    folder: Path,
) -> None:
    """Cluster with the model of the stage before, then train this stage's feed-forward networks."""
    seed = recipe.seed + number + 1
    sequential = recipe.method != "seeds" and recipe.clusters == "sequential"
    previous = _model_of(recipe, mcl[number - 1], base) if number and sequential else base
    workspace = Path(f"{mcl[number].folder}.labels-{mcl[number].fingerprint[:12]}")
    labels, told = labels_of_stage(recipe, mcl, number, previous, pairs, seed, workspace)
    seconds = told["seconds"]
    keeps = sequential and recipe.features == "training"
    kept = FeatureShards(workspace / "kept", len(pairs)) if keeps else None
    from_previous = sequential and recipe.stage_init == "previous" and previous is not base
    model = previous if from_previous else copy.deepcopy(base)
    networks = trained_networks(recipe, model, seed)
    rates = attention_rates(recipe, model)
    parameters = [p for network in networks.values() for p in network.parameters()]
    started = time.monotonic()
    history = train_contrastive(
        model,
        parameters + _named(model, rates),
        pairs,
        _batches(recipe, number, labels, pairs, seed),
        recipe.stage,
        stage=mcl[number],
        seed=seed,
        precision=recipe.precision,
        save_steps=recipe.save_steps,
        kept=kept,
        rates=rates,
    )
    seconds["training"] = time.monotonic() - started
    save_stage(recipe, model, folder)
    if labels is not None:
        save_file({"labels": torch.from_numpy(labels)}, folder / LABEL_FILE)
    if kept is not None:
        following = labels_of_next(recipe, kept, labels, model, pairs, seed + 1, seconds)
        save_file({"labels": torch.from_numpy(following)}, folder / NEXT_LABEL_FILE)
    write_log(
        folder,
        training=asdict(recipe.stage),
        num_processes=processes().num_processes,
        num_clusters=[] if labels is None else num_occupied_clusters(labels),
        skipped_pairs=pairs.skipped,
        **told,
        history=history,
    )
    tell_of_skipped(pairs.skipped, len(pairs), f"{mcl[number].folder / LOG_FILE}")
    if processes().is_main_process:
        shutil.rmtree(workspace, ignore_errors=True)


def _named(model: CLIPMoEModel, names: Iterable[str]) -> list[nn.Parameter]:
    return [model.get_parameter(name) for name in names]


def _batches(
    recipe: UpcycleRecipe, number: int, labels: np.ndarray | None, pairs: Pairs, seed: int
) -> EpochBatches:
    training = recipe.stage
    if labels is None:
        return random_batches(
            len(pairs), training.batch_size, training.steps, seed, _skipped(pairs)
        )
    labels = _clusters_of_batches(recipe, labels, seed)
    if recipe.clusters == "parallel":
        others = np.flatnonzero(labels[:, 0] != number)
        if len(pairs) - len(others) < 2:
            raise InputError(f"cluster {number} of {recipe.num_clusters}: fewer than two pairs")
        readable = others[labels[others, 0] >= 0]
        return random_batches(
            len(pairs), training.batch_size, training.steps, seed, others, back_off=readable
        )
    sampler = ClusterBatchSampler(
        labels, training.batch_size, seed=seed, global_share=recipe.global_share
    )
    return cluster_batches(sampler, training.steps)


def _router_batches(
    recipe: UpcycleRecipe, mcl: Sequence[Stage], training: RouterTraining, pairs: Pairs
) -> EpochBatches:
    """What the routers see, and whatever trains with them."""
    left_out = _skipped(pairs)
    if mcl and (mcl[-1].folder / LABEL_FILE).is_file():
        labels = read_labels(mcl[-1].folder / LABEL_FILE)
        if training.global_share < 1:
            clusters = _clusters_of_batches(recipe, labels, recipe.seed)
            sampler = ClusterBatchSampler(
                clusters, training.batch_size, recipe.seed, training.global_share
            )
            return cluster_batches(sampler, training.steps)
        left_out = np.union1d(left_out, np.flatnonzero((labels < 0).any(axis=1)))
    return random_batches(len(pairs), training.batch_size, training.steps, recipe.seed, left_out)


def _clusters_of_batches(recipe: UpcycleRecipe, labels: np.ndarray, seed: int) -> np.ndarray:
    return _exchanged(labels, seed) if recipe.method == "shuffled_labels" else labels


def _exchanged(labels: np.ndarray, seed: int) -> np.ndarray:
    """The labels ``(M, S)`` dealt out anew: clusters of the same sizes that mean nothing."""
    kept = np.flatnonzero((labels >= 0).all(axis=1))
    exchanged = labels.copy()
    exchanged[kept] = labels[np.random.default_rng([seed, 2]).permutation(kept)]
    return exchanged


def _skipped(pairs: Pairs) -> np.ndarray:
    return np.array(sorted(pairs.skipped), np.int64)


def _model_of(recipe: UpcycleRecipe, stage: Stage, base: CLIPMoEModel) -> CLIPMoEModel:
    return load_stage(recipe, copy.deepcopy(base), stage.folder)


def _assemble(
    recipe: UpcycleRecipe,
    mcl: Sequence[Stage],
    final: Stage,
    base: CLIPMoEModel,
    pairs: Pairs,
    seconds_of_stages: float,
    folder: Path,
) -> None:
    """Base and stages become the experts; then the routers train, of sparse upcycling and where the
    recipe says so the experts with them."""
    sparse = recipe.method == "sparse"
    low_rank = recipe.experts == "low_rank"
    experts = [ffn_state_dict(base)] * (recipe.num_experts if sparse else 1)
    experts += [load_file(stage.folder / EXPERT_FILE) for stage in mcl]
    distances = recipe.expert_spread, recipe.base_share
    if low_rank:
        experts = spread_low_rank_experts(experts[0], experts[1:], *distances)
    else:
        experts = spread_experts(experts, *distances)
    if mcl:
        load_attention(recipe, base, mcl[-1].folder)
    attention = attention_rates(recipe, base)
    generator = torch.Generator().manual_seed(recipe.seed)
    moe = moe_config(recipe, base)
    model = upcycle(
        base,
        experts,
        top_k=recipe.top_k,
        vision_layers=moe["vision_layers"],
        text_layers=moe["text_layers"],
        generator=generator,
        rank=recipe.rank if low_rank else None,
        router=router_options(recipe),
    )
    if recipe.experts == "truncated":
        to_low_rank(model, rank=recipe.rank, center="mean")
    layers = moe_layers(model)
    routers: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        routers[name] = layer.router.weight  # type: ignore[assignment]
    start = {name: weight.detach().clone() for name, weight in routers.items()}
    training = recipe.router
    rates = rates_beside_routers(recipe, layers, attention)
    parameters = [p for layer in layers.values() for p in _router_parameters(recipe, layer)]
    parameters += _named(model, rates)
    if sparse:
        training = replace(
            recipe.router, **{**asdict(recipe.stage), "steps": total_steps(recipe)}
        )
    history: list[dict[str, float]] = []
    if parameters:
        history = train_contrastive(
            model,
            parameters,
            pairs,
            _router_batches(recipe, mcl, training, pairs),
            training,
            stage=final,
            seed=recipe.seed,
            precision=recipe.precision,
            save_steps=recipe.save_steps,
            rates=rates,
        )
    write_model(
        recipe,
        model,
        training,
        pairs,
        history,
        folder,
        seconds_of_stages=seconds_of_stages,
        router_change={name: _relative_change(start[name], w) for name, w in routers.items()},
        stages=[_stage_log(stage) for stage in mcl],
    )


def total_steps(recipe: UpcycleRecipe) -> int:
    """Steps of all stages and the router: what a baseline without stages trains for."""
    return recipe.stage.steps * (recipe.num_experts - 1) + recipe.router.steps


def _fine_tune(
    recipe: UpcycleRecipe, final: Stage, base: CLIPMoEModel, pairs: Pairs, folder: Path
) -> None:
    """The baseline that stays dense."""
    training = replace(recipe.stage, steps=total_steps(recipe))
    rates = attention_rates(recipe, base)
    parameters = list(base.parameters())
    if recipe.direct_parameters == "ffn":
        sites = expert_sites(recipe, base)
        parameters = [parameter for site in sites for parameter in site.module.parameters()]
        parameters += _named(base, rates)
    batches = random_batches(
        len(pairs), training.batch_size, training.steps, recipe.seed, _skipped(pairs)
    )
    history = train_contrastive(
        base,
        parameters,
        pairs,
        batches,
        training,
        stage=final,
        seed=recipe.seed,
        precision=recipe.precision,
        save_steps=recipe.save_steps,
        rates=rates,
    )
    write_model(recipe, base, training, pairs, history, folder, seconds_of_stages=0.0)


def _router_parameters(recipe: UpcycleRecipe, layer: MoEFeedForward) -> list[nn.Parameter]:
    """What of a layer's router trains."""
    parameters: list[nn.Parameter] = []
    if recipe.router.kind == "trained":
        parameters += layer.router.parameters()
    if layer.base_gate is not None:
        parameters += layer.base_gate.parameters()
    if layer.expert_bias is not None:
        parameters.append(layer.expert_bias)
    return parameters


def _relative_change(before: Tensor, after: nn.Parameter) -> float:
    """How far a router has moved: norm of the change by the norm of its start."""
    return float((after.detach() - before).norm() / before.norm())


def _stage_log(stage: Stage) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((stage.folder / LOG_FILE).read_text(encoding="utf-8"))
    return log


def _unreachable(_folder: Path) -> None:
    raise AssertionError("a whole stage is not made again")
