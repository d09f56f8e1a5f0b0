"""``mllm bench tower``: the towers of :mod:`mllm.bench.tower`, and one DMU stage beside plain
fine-tuning of the same feed-forward networks on the same pairs."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mllm.allocator import keep_freed_memory
from mllm.bench import BenchReport, interleave, parse_options
from mllm.bench.tower import TowerOptions, measure_loading, measure_towers
from train import dmu, stages
from train.config import load_recipe
from train.contrastive import LOG_FILE, start_model, train_contrastive
from train.pair_batches import random_batches
from train.pairs import load_pairs
from train.recipe import ContrastiveRecipe, UpcycleRecipe
from train.stages import Stage
from vision_moe import find_ffns

_FIRST, _LATER = "first DMU stage", "DMU stage after the first"
_CHAIN, _PLAIN = "chain of three DMU stages", "plain fine-tuning"
_PARTS = ("features", "clustering", "training")


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


def measure_stage(report: BenchReport, recipe: UpcycleRecipe, repeats: int = 7) -> None:
    """The first DMU stage and one in the middle of a chain, beside the same training on random
    batches.

    All see every pair once.  A stage makes the clusters of the stage after it from the features
    that its training computes.  The first one makes its own clusters too, from the base's features
    of a sample of the pairs; a later one loads the expert before it.

    Args:
        report: Filled.
        recipe: As many pairs are used as its stage takes in one epoch.
        repeats: Rounds; the chain's first stage, which is made beforehand, warms up.
    """
    keep_freed_memory()  # as in ``mllm upcycle``
    stage = recipe.stage
    data = dataclasses.replace(recipe.data, num_pairs=stage.steps * stage.batch_size)
    base = start_model(recipe.model, None, recipe.seed)
    pairs = load_pairs(data, base, recipe.seed)
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="mllm-bench-") as folder:
        place = Path(folder)
        recipe = dataclasses.replace(recipe, data=data, features="training", out=str(place / "out"))
        mcl = dmu.mcl_stages(recipe)
        stages.run(mcl[0], partial(dmu.train_stage, recipe, mcl, 0, base, pairs))

        def dmu_stage(name: str, number: int) -> None:
            with tempfile.TemporaryDirectory(dir=place) as made:
                dmu.train_stage(recipe, mcl, number, base, pairs, Path(made))
                log = json.loads((Path(made) / LOG_FILE).read_text(encoding="utf-8"))
            for part in _PARTS:
                parts.setdefault(f"{name}, of it {part}", []).append(log["seconds"][part])

        def plain() -> None:
            model = copy.deepcopy(base)
            train_contrastive(
                model,
                [p for site in find_ffns(model) for p in site.module.parameters()],
                pairs,
                random_batches(len(pairs), stage.batch_size, stage.steps, recipe.seed),
                stage,
                stage=Stage("plain fine-tuning", place / "plain", {}),
                seed=recipe.seed,
                precision=recipe.precision,
                save_steps=None,
            )

        runs: dict[str, Callable[[], None]] = {
            _FIRST: partial(dmu_stage, _FIRST, 0),
            _LATER: partial(dmu_stage, _LATER, 1),
            _PLAIN: plain,
        }
        taken = interleave(runs, repeats, 0, "DMU stage")
    stages_of_round = zip(taken[_FIRST], taken[_LATER], strict=True)
    report.add_repeats({**taken, _CHAIN: [first + 2 * later for first, later in stages_of_round]})
    report.add_repeats(parts)
    for name in (_FIRST, _LATER):
        report.compare(f"{name} / {_PLAIN}", name, _PLAIN, "<=", 1.05)
    report.compare(f"{_CHAIN} / as many of {_PLAIN}", _CHAIN, _PLAIN, "<=", 1.05, 1 / 3)
    for part in parts:
        report.compare(f"{part} / {_PLAIN}", part, _PLAIN)
    report.facts["DMU stage: pairs, epochs"] = f"{len(pairs):,}, 1"
