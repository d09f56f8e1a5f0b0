"""``mllm train RECIPE --dry-run``: the plan of a run, from a model without weights."""

from collections.abc import Iterator
from typing import Any

from mllm.tiles import is_tiled, num_views
from train.estimate import estimate_step, planned_rows
from train.instruction_sources import load_sources
from train.parts import PARTS
from train.planned_model import planned_model
from train.recipe import InstructionRecipe, Recipe
from vision_moe import InputError

_FIRST_RECORDS = 3


def dry_run(recipe: Recipe) -> Iterator[str]:
    """Lines of the plan: shapes, parts, first records, steps, memory.

    Raises:
        InputError: Something that the recipe names is not there or does not fit.
    """
    if not isinstance(recipe, InstructionRecipe):
        raise InputError("--dry-run is for recipes of kind 'instruction'")
    data = load_sources(recipe.data, recipe.seed)
    planned = planned_model(recipe)
    config: Any = planned.model.config
    vision, text = config.vision_config, config.text_config
    tiles = ""
    if is_tiled(planned.model):
        most = max(num_views(planned.model, size) for size in config.image_grid_pinpoints)
        tiles = f" and up to {most - 1} tiles as large"
    yield (
        f"picture {vision.image_size} px{tiles} -> {config.image_seq_length} tokens of width"
        f" {vision.hidden_size}{' each' if tiles else ''} -> connector -> {text.hidden_size};"
        f" context {text.max_position_embeddings:,} tokens"
    )
    rows, plan = planned_rows(recipe, planned, data)
    for number, row in enumerate(rows[:_FIRST_RECORDS]):
        yield (
            f"record {number}: {len(row):,} tokens, {len(row.image_keys)} pictures,"
            f" {len(row.labels):,} tokens learnt"
        )
    if plan is not None:
        tokens = sum(len(rows[row]) for batch in plan.batches for row in batch)
        yield (
            f"{len(rows):,} rows; {len(plan.batches):,} batches, {plan.gradient_accumulation} to a"
            f" step, {plan.steps:,} steps, {tokens:,} tokens"
        )
    estimate = estimate_step(recipe, planned, rows, plan, data)
    yield f"{'part':<12}{'parameters':>16}{'that train':>16}  how"
    for part in PARTS:
        if (count := estimate.num_parameters.get(part)) is None:
            continue
        how = getattr(recipe.trainable, part)
        mode = how.mode if how.mode == "frozen" else f"{how.mode}, lr {how.lr:g}"
        yield f"{part:<12}{count['total']:>16,}{count['trained']:>16,}  {mode}"
    yield estimate.table()
