"""Connector pretraining and instruction tuning: a recipe in, an MLLM folder out.

The result is a plain LLaVA checkpoint: adapters are merged into the weights that they adapt.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm.model import save_mllm
from mllm.prompts import ChatPrompts
from mllm.tiles import is_tiled
from train import stages
from train.batch_plan import WeightedDraws, plan_batches
from train.config import recipe_dict, save_resolved
from train.connector_start import start_connector
from train.engine import Fitted, RunSettings, fit
from train.features import TowerFeatures
from train.instruction_data import BatchDataset
from train.instruction_model import InstructionModel
from train.instruction_rows import InstructionSample, RowLimits, chat_pieces, plain_pieces
from train.instruction_sources import load_sources
from train.mllm_checkpoint import RECIPE_FILE, MLLMContent
from train.parts import TrainableParts
from train.pictures import Pictures, PixelValues
from train.precision import use_bf16
from train.processes import processes
from train.recipe import InstructionRecipe
from train.router_losses import router_settings
from train.row_store import RowStore, collect_rows
from train.schedule import learning_rate_schedule
from train.sharding import name_units
from train.sources.base import InstructionData, SkippedSamples
from train.stages import Stage, StageResult
from train.starting_model import finished_model, load_model, set_parts
from train.tiled_pictures import TiledPictures
from vision_moe import InputError

# What a recipe says about the run rather than its result, and paths, whose content is an input.
_NOT_CONFIGURATION = (
    "out", "llm", "tower", "init_from", "log_steps", "log_to", "save_steps", "keep_checkpoints",
    "resume",
)  # fmt: skip

LOG_FILE = "training_log.json"


def run(recipe: InstructionRecipe) -> Path:
    """Train, unless the recipe's folder holds the result already.

    Raises:
        InputError: The recipe asks for something that is not there, or its folder holds something
            else.
    """
    run_stage(recipe, "instruction")
    return Path(recipe.out)


def run_stage(recipe: InstructionRecipe, name: str) -> StageResult:
    """:func:`run` under a name, with what the stage took."""
    stage = instruction_stage(recipe, name)
    return stages.run(stage, lambda folder: _make(recipe, stage, folder))


def instruction_stage(recipe: InstructionRecipe, name: str) -> Stage:
    """The stage that the recipe describes."""
    if recipe.tower is None and recipe.init_from is None:
        raise InputError("the recipe names neither a 'tower' nor an 'init_from'")
    content = recipe_dict(recipe)
    config = {key: value for key, value in content.items() if key not in _NOT_CONFIGURATION}
    sources = (recipe.llm if recipe.init_from is None else None, recipe.tower, recipe.init_from)
    inputs = ["none" if source is None else stages.fingerprint_of(source) for source in sources]
    return Stage(name, Path(recipe.out), config, inputs)


def _make(recipe: InstructionRecipe, stage: Stage, folder: Path) -> None:
    """Fill ``folder`` with the trained MLLM."""
    model, processor, log = _train(recipe, stage)
    if not processes().is_main_process:
        return
    save_mllm(model, processor, folder)
    save_resolved(recipe, folder / RECIPE_FILE)
    (folder / LOG_FILE).write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


def _train(
    recipe: InstructionRecipe, stage: Stage
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, dict[str, Any]]:
    """The trained MLLM, adapters merged, and what there is to say of the run."""
    started = time.monotonic()
    model, processor = load_model(recipe)
    data = load_sources(recipe.data, recipe.seed)
    pictures, num_image_tokens = picture_inputs(recipe, model, processor, data)
    rows = build_rows(recipe, model, processor, data.samples, num_image_tokens)
    explained = _start_connector(recipe, model, processor, data)
    parts = set_parts(recipe, model)
    plan = plan_run(recipe, rows)
    if isinstance(pictures, TowerFeatures) and processes().num_processes > 1:
        _encode_ahead(pictures, plan, rows)
    fitted = _fit(recipe, stage, model, processor, parts, plan, rows, pictures, data.skipped)
    if fitted.gathered is None:
        parts.merge()
    else:
        model, processor = finished_model(recipe, fitted.gathered, "the trained model")
    data.skipped.report()
    log = {
        "seconds": round(time.monotonic() - started, 3),
        "steps": plan.steps,
        "num_processes": processes().num_processes,
        "num_samples": len(rows),
        "skipped": data.skipped.faults,
        "num_tokens": sum(rows.lengths[row] for batch in plan.batches for row in batch),
        "num_parameters": parts.num_parameters,
        "connector_start_explained": explained,
        "history": fitted.history,
    }
    return model.eval(), processor, log


def _start_connector(
    recipe: InstructionRecipe,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    data: InstructionData,
) -> float | None:
    """The share of the words' variance that the connector explains; ``None`` of a random start."""
    if recipe.init_from is not None or recipe.connector_start == "random":
        return None
    if recipe.connector_start_data:
        data = load_sources(recipe.connector_start_data, recipe.seed)
    if is_tiled(model):
        raise InputError("'connector_start: words' is for pictures that are shown whole")
    seen = tower_features(recipe, model, processor, data)
    return start_connector(model, processor.tokenizer, data.samples, seen.read, recipe.seed)


def picture_inputs(
    recipe: InstructionRecipe,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    data: InstructionData,
) -> tuple[Pictures, Callable[[int], int]]:
    """What a step reads of its pictures, and how many tokens each has.

    Kept features, or pixels for a tower that trains.
    """
    if not is_tiled(model):
        num_tokens = model.config.image_seq_length
        return _inputs(recipe, model, processor, data, processor.image_processor), (
            lambda _: num_tokens
        )
    tiled = TiledPictures(model, processor, data)
    views = InstructionData([], tiled.open_views, tiled.identities)
    inputs = _inputs(recipe, model, processor, views, tiled.processor)
    return tiled.shown_by(inputs), tiled.num_tokens


def _inputs(
    recipe: InstructionRecipe,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    data: InstructionData,
    image_processor: Any,
) -> Pictures:
    if recipe.trainable.tower_trains:
        return PixelValues(data.open_images, image_processor)
    return tower_features(recipe, model, processor, data, image_processor=image_processor)


def tower_features(
    recipe: InstructionRecipe,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    data: InstructionData,
    image_processor: Any = None,
    cache: Path | None = None,
) -> TowerFeatures:
    """What the connector reads of every picture, as the processor or another shows it; kept in the
    user's cache by default."""
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise InputError(f"'vision_feature_layer' of the MLLM is {layer}, it must be one layer")
    return TowerFeatures(
        model.model.vision_tower,
        image_processor or processor.image_processor,
        data.open_images,
        data.image_identities,
        layer=layer,
        drop_first=model.config.vision_feature_select_strategy == "default",
        bf16=use_bf16(recipe.tower_precision or recipe.precision),
        cache=cache,
    )


def build_rows(
    recipe: InstructionRecipe,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[InstructionSample],
    num_image_tokens: Callable[[int], int] | None = None,
) -> RowStore:
    """Token rows of the samples, in the recipe's template, within the language model's context.

    Args:
        recipe: Of the run.
        model: Whose context and picture tokens count.
        processor: Its processor.
        samples: Of the run's data.
        num_image_tokens: Of each picture, where they differ.
    """
    config = model.config
    context = model.model.language_model.config.max_position_embeddings
    limits = RowLimits(
        image_token_id=config.image_token_id,
        num_image_tokens=num_image_tokens or (lambda _: config.image_seq_length),
        max_tokens=min(context, recipe.max_length or context),
    )
    if recipe.template == "plain":
        pieces = partial(
            plain_pieces, tokenizer=processor.tokenizer, image_token_id=config.image_token_id
        )
        return collect_rows(samples, pieces, limits)
    prompts = ChatPrompts(processor, config.image_seq_length)
    return collect_rows(samples, partial(chat_pieces, prompts=prompts), limits)


@dataclass(frozen=True)
class RunPlan:
    """Every batch of a run, as row numbers, and the optimiser steps that they make.

    Batch ``i`` goes to process ``i % num_processes``; one that is empty fills up the last step.
    """

    batches: list[list[int]]
    steps: int
    gradient_accumulation: int


def plan_run(recipe: InstructionRecipe, rows: RowStore) -> RunPlan:
    """Which rows each step sees, decided before the first, so that resuming is exact."""
    if recipe.steps is None and recipe.epochs is None:
        raise InputError("the recipe sets neither 'steps' nor 'epochs'")
    num_processes = processes().num_processes
    accumulation = _gradient_accumulation(recipe, num_processes)
    per_step = accumulation * num_processes
    draws = WeightedDraws(rows.sources, [one.weight for one in recipe.data], recipe.seed)
    planned = plan_batches(
        rows,
        draws,
        recipe.batch_rows,
        recipe.max_tokens_per_batch,
        recipe.seed,
        per_step if recipe.group_by_modality else None,
    )
    if recipe.steps is not None:
        chosen = itertools.islice(planned, recipe.steps * per_step)
        return RunPlan(list(chosen), recipe.steps, accumulation)
    assert recipe.epochs is not None
    batches = list(_first_rows(planned, round(recipe.epochs * len(draws))))
    steps = math.ceil(len(batches) / per_step)
    batches += [[] for _ in range(-len(batches) % num_processes)]
    return RunPlan(batches, steps, accumulation)


def _gradient_accumulation(recipe: InstructionRecipe, num_processes: int) -> int:
    if recipe.global_batch is None:
        return recipe.gradient_accumulation
    at_once = recipe.batch_rows * num_processes
    if recipe.global_batch % at_once:
        raise InputError(
            f"'global_batch' is {recipe.global_batch}, no multiple of {recipe.batch_rows}"
            f" 'batch_rows' on {num_processes} processes"
        )
    return recipe.global_batch // at_once


def _first_rows(planned: Iterator[list[int]], num_rows: int) -> Iterator[list[int]]:
    """Whole batches until ``num_rows`` rows, at least one, have been seen."""
    seen = 0
    for batch in planned:
        yield batch
        seen += len(batch)
        if seen >= num_rows:
            return


def _encode_ahead(pictures: TowerFeatures, plan: RunPlan, rows: RowStore) -> None:
    """All of this process's pictures, while it has the whole tower: FSDP spreads it."""
    state = processes()
    batches = plan.batches[state.process_index :: state.num_processes]
    keys = {key for batch in batches for row in batch for key in rows.image_keys(row)}
    pictures.read_ahead(sorted(keys))


def training_module(
    recipe: InstructionRecipe, model: LlavaForConditionalGeneration, parts: TrainableParts
) -> InstructionModel:
    """What computes the loss of a batch."""
    module = InstructionModel(model, router_settings(recipe, model, parts), recipe.int8_products)
    if recipe.gradient_checkpointing:
        module.checkpoint_blocks()
    name_units(module)
    return module


def optimizer_of(recipe: InstructionRecipe, parts: TrainableParts) -> torch.optim.Optimizer:
    """AdamW, each part at its own rate."""
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": getattr(recipe.trainable, part).lr}
        for part, parameters in parts.parameters.items()
    ]
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)


def _fit(
    recipe: InstructionRecipe,
    stage: Stage,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    parts: TrainableParts,
    plan: RunPlan,
    rows: RowStore,
    pictures: Pictures,
    skipped: SkippedSamples,
) -> Fitted:
    optimizer = optimizer_of(recipe, parts)
    warmup_steps = math.ceil(recipe.warmup_ratio * plan.steps)
    borrowed = recipe.llm_quantization != "none" and recipe.trainable.llm.mode == "frozen"
    fitted = fit(
        training_module(recipe, model, parts),
        BatchDataset(rows, plan.batches, pictures, processor.tokenizer.pad_token_id or 0),
        optimizer,
        learning_rate_schedule(optimizer, recipe.schedule, warmup_steps, plan.steps),
        plan.steps,
        RunSettings(
            folder=Path(recipe.out),
            fingerprint=stage.fingerprint,
            description=stage.name,
            seed=recipe.seed,
            bf16=use_bf16(recipe.precision),
            gradient_accumulation=plan.gradient_accumulation,
            max_grad_norm=recipe.max_grad_norm,
            log_steps=recipe.log_steps,
            log_to=recipe.log_to,
            save_steps=recipe.save_steps,
            keep_checkpoints=recipe.keep_checkpoints,
            resume=recipe.resume == "auto",
        ),
        MLLMContent(model, parts, recipe),
        num_skipped=lambda: len(skipped.faults),
        gather=borrowed,
    )
    if fitted.gathered is None:
        return fitted
    plain = {name.removeprefix("llava."): value for name, value in fitted.gathered.items()}
    return dataclasses.replace(fitted, gathered=plain)
