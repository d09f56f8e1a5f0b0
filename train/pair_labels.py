"""What the batches of a stage follow: each pair's accumulated cluster.

The features that are clustered come from a pass over all pairs before the stage, or were kept while
the stage before trained; ``features`` of the recipe says which.

M pairs, S stages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes

from train.contrastive import LOG_FILE
from train.encoding import encode_to_shards
from train.pairs import Pairs
from train.processes import processes
from train.recipe import UpcycleRecipe
from train.stages import Stage
from vision_moe import (
    CLIPMoEModel,
    FeatureShards,
    accumulate_labels,
    atomic_write_bytes,
    atomic_write_text,
    stage_labels,
)

LABEL_FILE = "labels.safetensors"
#: Those of the stage after, where the features are kept that training has computed.
NEXT_LABEL_FILE = "next_labels.safetensors"


def labels_of_stage(
    recipe: UpcycleRecipe,
    mcl: Sequence[Stage],
    number: int,
    previous: CLIPMoEModel,
    pairs: Pairs,
    seed: int,
    workspace: Path,
) -> tuple[np.ndarray | None, dict[str, float]]:
    """The accumulated labels ``(M, S)`` that a stage's batches follow, if they follow any."""
    if recipe.method == "seeds":
        return None, {}
    before = mcl[number - 1].folder / LABEL_FILE if number else None
    if before is not None and recipe.clusters == "parallel":
        return read_labels(before), {}  # all stages share the base's clusters
    if before is not None and recipe.features == "training":
        folder = mcl[number - 1].folder
        log = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
        pairs.skip({int(pair): reason for pair, reason in log["skipped_pairs"].items()})
        labels = read_labels(folder / NEXT_LABEL_FILE)
        return labels, {"features": 0.0, "clustering": 0.0}
    return _accumulated_labels(recipe, workspace, before, previous, pairs, seed)


def _accumulated_labels(
    recipe: UpcycleRecipe,
    workspace: Path,
    before: Path | None,
    previous: CLIPMoEModel,
    pairs: Pairs,
    seed: int,
) -> tuple[np.ndarray, dict[str, float]]:
    """``(M, S)``: the labels of the stages ``before`` and this one's; and what took how long.

    They are kept in ``workspace`` until the stage is whole, so that a run that was broken off in
    its training neither encodes nor clusters again.
    """
    file, report = workspace / LABEL_FILE, workspace / "report.json"
    if not file.is_file():
        started = time.monotonic()
        shards = encode_to_shards(previous, pairs, recipe.precision, workspace / "features")
        encoded = time.monotonic()
        if processes().is_main_process:
            known = None if before is None else read_labels(before)
            labels = _cluster(recipe, shards, known, seed)
            seconds = {"features": encoded - started, "clustering": time.monotonic() - encoded}
            skipped = list(pairs.skipped.items())
            atomic_write_text(report, json.dumps({"skipped": skipped, "seconds": seconds}))
            atomic_write_bytes(file, save_bytes({"labels": torch.from_numpy(labels)}))
        processes().wait_for_everyone()
        if processes().is_main_process:
            shards.remove()
    content = json.loads(report.read_text(encoding="utf-8"))
    pairs.skip(dict(content["skipped"]))
    return read_labels(file), content["seconds"]


def labels_of_next(
    recipe: UpcycleRecipe,
    kept: FeatureShards,
    labels: np.ndarray | None,
    model: CLIPMoEModel,
    pairs: Pairs,
    seed: int,
    seconds: dict[str, float],
) -> np.ndarray:
    """The labels ``(M, S + 1)`` of the stage after, by what training has kept; what it took is
    added to ``seconds``. Of use on the main process."""
    started = time.monotonic()
    shards = encode_to_shards(model, pairs, recipe.precision, kept.folder)
    seconds["features"] += time.monotonic() - started
    if not processes().is_main_process:
        return np.empty((0, 1), np.int8)
    started = time.monotonic()
    following = _cluster(recipe, shards, labels, seed)
    seconds["clustering"] += time.monotonic() - started
    return following


def _cluster(
    recipe: UpcycleRecipe, shards: FeatureShards, before: np.ndarray | None, seed: int
) -> np.ndarray:
    """The labels ``before`` and one more column ``(M, S + 1)``, in the smallest integers."""
    new = stage_labels(
        shards.image, shards.text, recipe.num_clusters, seed, recipe.cluster_modality
    )
    labels = accumulate_labels(before, new)
    return labels.astype(np.min_scalar_type(-int(labels.max()) - 1))  # a byte, for K up to 11


def read_labels(file: Path) -> np.ndarray:
    """``(M, S)``, memory-mapped."""
    return load_file(file)["labels"].numpy()
