"""``mllm bench tower``: the towers of :mod:`mllm.bench.tower`, and one DMU stage beside plain
fine-tuning of the same feed-forward networks on the same pairs."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mllm.allocator import keep_freed_memory
from mllm.bench import BenchReport, interleave, parse_options
from mllm.bench.tower import TowerOptions, measure_loading, measure_towers
from train import dmu
from train.config import load_recipe
from train.contrastive import LOG_FILE, start_model, train_contrastive
from train.pair_batches import random_batches
from train.pairs import load_pairs
from train.recipe import ContrastiveRecipe, UpcycleRecipe
from train.stages import Stage
from vision_moe import find_ffns


def run(overrides: Sequence[str] = ()) -> BenchReport:
    """Measure everything that is asked for."""
    options = parse_options(TowerOptions, overrides)
    report = BenchReport("tower", dataclasses.asdict(options))
    measure_towers(report, options)
    if options.loading:
        measure_loading(report, options.loading)
    if options.stage:
        measure_stage(report, quickstart_stage())
    return report


def quickstart_stage() -> UpcycleRecipe:
    """The quickstart's recipe, on a base of its architecture with random weights."""
    base = load_recipe("quickstart_clip")
    recipe = load_recipe("quickstart_clip_moe")
    assert isinstance(base, ContrastiveRecipe) and isinstance(recipe, UpcycleRecipe)
    return dataclasses.replace(recipe, model=base.model)


def measure_stage(
    report: BenchReport, recipe: UpcycleRecipe, repeats: int = 2, warmup: int = 1
) -> None:
    """The first DMU stage: one epoch over the pairs, after encoding and clustering them, beside
    one epoch of the same training on random batches.

    Args:
        report: Filled.
        recipe: As many pairs are used as its stage takes in one epoch.
        repeats: Rounds that count.
        warmup: Rounds before them.
    """
    keep_freed_memory()  # as in ``mllm upcycle``
    stage = recipe.stage
    data = dataclasses.replace(recipe.data, num_pairs=stage.steps * stage.batch_size)
    recipe = dataclasses.replace(recipe, data=data)
    base = start_model(recipe.model, None, recipe.seed)
    pairs = load_pairs(recipe.data, base, recipe.seed)
    parts: dict[str, list[float]] = {"features": [], "clustering": [], "training": []}

    def dmu_stage() -> None:
        with tempfile.TemporaryDirectory(prefix="mllm-bench-") as folder:
            mcl = dmu.mcl_stages(dataclasses.replace(recipe, out=f"{folder}/out"))
            dmu.train_stage(recipe, mcl, 0, base, pairs, Path(folder))
            log = json.loads((Path(folder) / LOG_FILE).read_text(encoding="utf-8"))
        for name, values in parts.items():
            values.append(log["seconds"][name])

    def plain() -> None:
        with tempfile.TemporaryDirectory(prefix="mllm-bench-") as folder:
            model = copy.deepcopy(base)
            train_contrastive(
                model,
                [p for site in find_ffns(model) for p in site.module.parameters()],
                pairs,
                random_batches(len(pairs), stage.batch_size, stage.steps, recipe.seed),
                stage,
                stage=Stage("plain fine-tuning", Path(folder) / "plain", {}),
                seed=recipe.seed,
                precision=recipe.precision,
                save_steps=None,
            )

    runs = {"DMU stage": dmu_stage, "plain fine-tuning": plain}
    report.add_repeats(interleave(runs, repeats, warmup, "DMU stage"))
    report.add_repeats({k: v[-repeats:] for k, v in parts.items()}, "DMU stage, of it ")
    report.compare("DMU stage / plain fine-tuning", "DMU stage", "plain fine-tuning", "<=", 1.05)
    report.compare(
        "DMU stage's training / plain fine-tuning", "DMU stage, of it training", "plain fine-tuning"
    )
    report.facts["DMU stage: pairs, epochs"] = f"{len(pairs):,}, 1"
