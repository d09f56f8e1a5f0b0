"""Diversified multiplet upcycling: a dense CLIP becomes a CLIP-MoE (arXiv 2409.19291, section 3).

Stages 1 to N-1 of multistage contrastive learning each train the feed-forward networks on batches
from one accumulated cluster; the base's and every stage's networks become the experts; a router is
tuned with all else frozen.  Stages stand in ``<out>.stages`` and are not run again once whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from train import stages
from train.attention import attention_kernel
from train.config import save_resolved
from train.contrastive import (
    LOG_FILE,
    RECIPE_FILE,
    configuration,
    data_inputs,
    longest_sequence,
    model_inputs,
    start_model,
    train_contrastive,
    write_log,
)
from train.pairs import Pairs, load_pairs, random_batches
from train.precision import use_bf16
from train.recipe import Precision, UpcycleRecipe
from train.stages import Stage, StageResult
from vision_moe import (
    CLIPMoEModel,
    ClusterBatchSampler,
    InputError,
    accumulate_labels,
    ffn_state_dict,
    find_ffns,
    load_ffn_state_dict,
    moe_layers,
    num_occupied_clusters,
    save,
    stage_labels,
    upcycle,
)

EXPERT_FILE, LABEL_FILE = "expert.safetensors", "labels.safetensors"


def run(recipe: UpcycleRecipe) -> Path:
    """Upcycle, unless the recipe's folder holds the result already."""
    run_stage(recipe, "router tuning")
    return Path(recipe.out)


def run_stage(recipe: UpcycleRecipe, name: str) -> StageResult:
    """:func:`run` under a name; the time of the stages before is included."""
    if recipe.top_k > recipe.num_experts:
        raise InputError(f"'top_k' is {recipe.top_k}, but there are {recipe.num_experts} experts")
    mcl = mcl_stages(recipe)
    final = Stage(
        name,
        Path(recipe.out),
        configuration(recipe),
        [stage.fingerprint for stage in mcl],
    )
    if final.check():
        log = json.loads((final.folder / LOG_FILE).read_text(encoding="utf-8"))
        seconds = stages.run(final, _unreachable).seconds + log["seconds_of_stages"]
        return StageResult(final.fingerprint, seconds, skipped=True)
    base = start_model(recipe.model, recipe.pretrained, recipe.seed)
    if base.config.moe is not None:
        raise InputError(
            f"{recipe.model}: a mixture of experts already; only a dense CLIP is upcycled"
        )
    pairs = load_pairs(recipe.data, base, recipe.seed)
    before = 0.0
    for number, stage in enumerate(mcl):
        train_stage = partial(_train_stage, recipe, mcl, number, base, pairs)
        before += stages.run(stage, train_stage).seconds
    assemble = partial(_assemble, recipe, mcl, final, base, pairs, before)
    result = stages.run(final, assemble)
    return StageResult(result.fingerprint, before + result.seconds, skipped=False)


def mcl_stages(recipe: UpcycleRecipe) -> list[Stage]:
    """Stages 1 to N-1, each resting on those before it."""
    config = configuration(recipe)
    for later in ("router", "num_experts", "top_k"):
        config.pop(later)
    inputs = [*model_inputs(recipe.model), *data_inputs(recipe.data)]
    made: list[Stage] = []
    for number in range(1, recipe.num_experts):
        folder = Path(f"{recipe.out}.stages") / f"stage_{number}"
        made.append(Stage(f"contrastive stage {number}", folder, config, inputs))
        inputs = [made[-1].fingerprint]
    return made


def _train_stage(
    recipe: UpcycleRecipe,
    mcl: Sequence[Stage],
    number: int,
    base: CLIPMoEModel,
    pairs: Pairs,
    folder: Path,
) -> None:
    """Cluster with the model of the stage before, then train this stage's feed-forward networks."""
    seed = recipe.seed + number + 1
    previous = _model_of(mcl[number - 1], base) if number else base
    labels = _accumulated_labels(recipe, mcl, number, previous, pairs, seed)
    model = previous if recipe.stage_init == "previous" else base
    model = copy.deepcopy(model) if model is base else model
    sampler = ClusterBatchSampler(
        labels, recipe.stage.batch_size, seed=seed, global_share=recipe.global_share
    )
    history = train_contrastive(
        model,
        [p for site in find_ffns(model) for p in site.module.parameters()],
        pairs,
        _batches(sampler, recipe.stage.steps),
        recipe.stage,
        stage=mcl[number],
        seed=seed,
        precision=recipe.precision,
        save_steps=recipe.save_steps,
    )
    save_file(ffn_state_dict(model), folder / EXPERT_FILE)
    save_file({"labels": torch.from_numpy(labels)}, folder / LABEL_FILE)
    write_log(
        folder,
        training=asdict(recipe.stage),
        num_clusters=num_occupied_clusters(labels),
        history=history,
    )


def _model_of(stage: Stage, base: CLIPMoEModel) -> CLIPMoEModel:
    model = copy.deepcopy(base)
    load_ffn_state_dict(model, load_file(stage.folder / EXPERT_FILE))
    return model


def _accumulated_labels(
    recipe: UpcycleRecipe,
    mcl: Sequence[Stage],
    number: int,
    previous: CLIPMoEModel,
    pairs: Pairs,
    seed: int,
) -> np.ndarray:
    """``(M, S)``: the labels of the stages before and this one's."""
    image, text = encode_all(previous, pairs, recipe.precision)
    new = stage_labels(image.numpy(), text.numpy(), recipe.num_clusters, seed)
    if not number:
        return accumulate_labels(None, new)
    before = load_file(mcl[number - 1].folder / LABEL_FILE)["labels"].numpy()
    return accumulate_labels(before, new)


@torch.inference_mode()
def encode_all(
    model: CLIPMoEModel, pairs: Pairs, precision: Precision, batch_size: int = 512
) -> tuple[Tensor, Tensor]:
    """Image and text features of all pairs, ``(M, D)`` each, fp32 on the CPU."""
    device = model.device
    by_length = pairs.tokens.ne(0).sum(1).argsort(stable=True)
    image, text = [], []
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision)),
        attention_kernel(device, longest_sequence(model)),
        tqdm(total=len(by_length), desc="encoding pairs", unit="pair", delay=2) as bar,
    ):
        for chosen in by_length.split(batch_size):
            pixel_values = pairs.pixel_values(chosen.numpy())
            tokens = model.trim_tokens(pairs.tokens[chosen])
            image.append(model.encode_image(pixel_values.to(device)).float().cpu())
            text.append(model.encode_text(tokens.to(device)).float().cpu())
            bar.update(len(chosen))
    back = by_length.argsort()
    return torch.cat(image)[back], torch.cat(text)[back]


def _batches(sampler: ClusterBatchSampler, steps: int) -> list[np.ndarray]:
    """The first ``steps`` batches of as many epochs as that takes; batches cut short are left out
    unless there are no others."""
    batches: list[np.ndarray] = []
    epoch = 0
    while len(batches) < steps:
        sampler.set_epoch(epoch)
        made = sampler.batches()
        whole = [batch for batch in made if len(batch) == sampler.batch_size]
        batches += whole or made
        epoch += 1
    return batches[:steps]


def _assemble(
    recipe: UpcycleRecipe,
    mcl: Sequence[Stage],
    final: Stage,
    base: CLIPMoEModel,
    pairs: Pairs,
    seconds_of_stages: float,
    folder: Path,
) -> None:
    """Base and stages become the experts; then the routers train."""
    experts = [ffn_state_dict(base)]
    experts += [load_file(stage.folder / EXPERT_FILE) for stage in mcl]
    generator = torch.Generator().manual_seed(recipe.seed)
    model = upcycle(base, experts, top_k=recipe.top_k, generator=generator)
    routers: dict[str, nn.Parameter] = {}
    for name, layer in moe_layers(model).items():
        routers[name] = layer.router.weight  # type: ignore[assignment]
    start = {name: weight.detach().clone() for name, weight in routers.items()}
    training = recipe.router
    history = train_contrastive(
        model,
        list(routers.values()),
        pairs,
        random_batches(len(pairs.tokens), training.batch_size, training.steps, recipe.seed),
        training,
        stage=final,
        seed=recipe.seed,
        precision=recipe.precision,
        save_steps=recipe.save_steps,
    )
    save(model, folder)
    save_resolved(recipe, folder / RECIPE_FILE)
    write_log(
        folder,
        training=asdict(training),
        num_pairs=len(pairs.tokens),
        seconds_of_stages=seconds_of_stages,
        router_change={name: _relative_change(start[name], w) for name, w in routers.items()},
        stages=[_stage_log(stage) for stage in mcl],
        history=history,
    )


def _relative_change(before: Tensor, after: nn.Parameter) -> float:
    """How far a router has moved: norm of the change by the norm of its start."""
    return float((after.detach() - before).norm() / before.norm())


def _stage_log(stage: Stage) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((stage.folder / LOG_FILE).read_text(encoding="utf-8"))
    return log


def _unreachable(_folder: Path) -> None:
    raise AssertionError("a whole stage is not made again")
