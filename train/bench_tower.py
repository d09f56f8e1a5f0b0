"""``mllm bench tower``: the towers of :mod:`mllm.bench.tower`, and one DMU stage beside plain
fine-tuning of the same feed-forward networks on the same pairs."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mllm.allocator import keep_freed_memory
from mllm.bench import BenchReport, interleave, parse_options
from mllm.bench.tower import TowerOptions, measure_loading, measure_towers
from train import dmu, stages
from train.config import load_recipe
from train.contrastive import LOG_FILE, start_model, train_contrastive
from train.pair_batches import random_batches
from train.pair_labels import labels_of_stage
from train.pairs import load_pairs
from train.recipe import ContrastiveRecipe, UpcycleRecipe
from train.stages import Stage
from vision_moe import find_ffns

_STAGE, _PLAIN = "DMU stage after the first", "plain fine-tuning"
_PASS = "pass over the base's features before the first stage"
_FIRST = "first DMU stage with its pass"


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
    """A DMU stage in the middle of a chain, beside the same training on random batches.

    Both see every pair once.  The stage loads the expert before it, and makes the clusters of the
    stage after it from the features that its training computes.  Before the first stage no
    training has computed any: its pass over all pairs is measured apart, and added for the stage
    that pays it.

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
    parts: dict[str, list[float]] = {"training": [], "features": [], "clustering": []}
    with tempfile.TemporaryDirectory(prefix="mllm-bench-") as folder:
        place = Path(folder)
        recipe = dataclasses.replace(recipe, data=data, features="training", out=str(place / "out"))
        mcl = dmu.mcl_stages(recipe)
        stages.run(mcl[0], partial(dmu.train_stage, recipe, mcl, 0, base, pairs))

        def middle_stage() -> None:
            with tempfile.TemporaryDirectory(dir=place) as made:
                dmu.train_stage(recipe, mcl, 1, base, pairs, Path(made))
                log = json.loads((Path(made) / LOG_FILE).read_text(encoding="utf-8"))
            for name, values in parts.items():
                values.append(log["seconds"][name])

        def first_pass() -> None:
            with tempfile.TemporaryDirectory(dir=place) as workspace:
                labels_of_stage(recipe, mcl, 0, base, pairs, recipe.seed, Path(workspace))

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

        runs = {_STAGE: middle_stage, _PASS: first_pass, _PLAIN: plain}
        taken = interleave(runs, repeats, 0, "DMU stage")
    first = [sum(both) for both in zip(taken[_PASS], taken[_STAGE], strict=True)]
    report.add_repeats({**taken, _FIRST: first})
    report.add_repeats(parts, f"{_STAGE}, of it ")
    report.compare(f"{_STAGE} / {_PLAIN}", _STAGE, _PLAIN, "<=", 1.05)
    report.compare(f"{_FIRST} / {_PLAIN}", _FIRST, _PLAIN, "<=", 1.05)
    for part in parts:
        report.compare(f"{_STAGE}'s {part} / {_PLAIN}", f"{_STAGE}, of it {part}", _PLAIN)
    report.compare(f"{_PASS} / {_PLAIN}", _PASS, _PLAIN)
    report.facts["DMU stage: pairs, epochs"] = f"{len(pairs):,}, 1"
