"""What the batches of a stage follow: each pair's accumulated cluster.

The features that are clustered come from a pass over all pairs before the stage, or were kept while
the stage before trained; ``features`` of the recipe says which.  Nothing has trained before the
first stage: there the base encodes a sample of the pairs, and the clusters of the sample teach
:class:`vision_moe.CaptionLabels` what captions tell of the others'.

M pairs, N of a sample, S stages.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from tqdm import tqdm

from train.contrastive import LOG_FILE
from train.encoding import encode_to_shards
from train.pairs import Pairs
from train.processes import processes
from train.recipe import UpcycleRecipe
from train.stages import Stage
from vision_moe import (
    CaptionLabels,
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

#: The sample that the base encodes: one pair in so many, which is 1 % of the stage's training, but
#: at least so many, and so many for each cluster; no more than centers are made of.
SAMPLE_OF, MIN_SAMPLE, MIN_SAMPLE_EACH, MAX_SAMPLE = 32, 256, 64, 16_384
#: Captions that are read at a time.
PIECE_ROWS = 8192


def labels_of_stage(
    recipe: UpcycleRecipe,
    mcl: Sequence[Stage],
    number: int,
    previous: CLIPMoEModel,
    pairs: Pairs,
    seed: int,
    workspace: Path,
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The accumulated labels ``(M, S)`` that a stage's batches follow, if they follow any; and for
    the log the ``seconds`` of each part and, where captions gave labels, their ``agreement``."""
    if recipe.method == "seeds":
        return None, {"seconds": {}}
    before = mcl[number - 1].folder / LABEL_FILE if number else None
    if before is not None and recipe.clusters == "parallel":
        return read_labels(before), {"seconds": {}}  # all stages share the base's clusters
    if before is not None and recipe.features == "training":
        folder = mcl[number - 1].folder
        log = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
        pairs.skip({int(pair): reason for pair, reason in log["skipped_pairs"].items()})
        labels = read_labels(folder / NEXT_LABEL_FILE)
        return labels, {"seconds": {"features": 0.0, "clustering": 0.0}}
    return _accumulated_labels(recipe, workspace, before, previous, pairs, seed)


def _accumulated_labels(
    recipe: UpcycleRecipe,
    workspace: Path,
    before: Path | None,
    previous: CLIPMoEModel,
    pairs: Pairs,
    seed: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """``(M, S)``: the labels of the stages ``before`` and this one's; and what the log is told.

    They are kept in ``workspace`` until the stage is whole, so that a run that was broken off in
    its training neither encodes nor clusters again.
    """
    file, report = workspace / LABEL_FILE, workspace / "report.json"
    if not file.is_file():
        started = time.monotonic()
        sample = _sample(recipe, len(pairs), seed) if before is None else None
        features = workspace / ("features" if sample is None else "sample")
        shards = encode_to_shards(previous, pairs, recipe.precision, features, sample)
        encoded = time.monotonic()
        labels = np.empty((0, 1), np.int8)
        if processes().is_main_process:
            known = None if before is None else read_labels(before)
            labels = _cluster(recipe, shards, known, seed)
        told: dict[str, Any] = {}
        if sample is not None:
            pad_id = getattr(previous.text, "pad_id", 0)
            labels, agreement = _labels_by_captions(recipe, sample, labels, pairs, pad_id, seed)
            told["agreement"] = agreement
        if processes().is_main_process:
            told["seconds"] = {
                "features": encoded - started, "clustering": time.monotonic() - encoded
            }  # fmt: skip
            skipped = list(pairs.skipped.items())
            atomic_write_text(report, json.dumps({"skipped": skipped, "told": told}))
            atomic_write_bytes(file, save_bytes({"labels": torch.from_numpy(labels)}))
        processes().wait_for_everyone()
        if processes().is_main_process:
            shards.remove()
    content = json.loads(report.read_text(encoding="utf-8"))
    pairs.skip(dict(content["skipped"]))
    return read_labels(file), content["told"]


def _sample(recipe: UpcycleRecipe, num_pairs: int, seed: int) -> np.ndarray | None:
    """Ascending numbers ``(N,)`` of the pairs that the base encodes; ``None`` for all."""
    if recipe.features == "pass" or recipe.clusters == "parallel":
        return None
    least = max(MIN_SAMPLE, MIN_SAMPLE_EACH * recipe.num_clusters)
    size = max(least, min(num_pairs // SAMPLE_OF, MAX_SAMPLE))
    if size >= num_pairs:
        return None
    return np.sort(np.random.default_rng([seed, 4]).choice(num_pairs, size, replace=False))


def _labels_by_captions(
    recipe: UpcycleRecipe,
    sample: np.ndarray,
    labels: np.ndarray,
    pairs: Pairs,
    pad_id: int,
    seed: int,
) -> tuple[np.ndarray, dict[str, float]]:
    """The labels ``(N, 1)`` of the sample, which the main process has, and by what they say of
    captions those of all pairs ``(M, 1)``, of which each process reads its share; and the share of
    the clusters that captions tell right."""
    state = processes()
    both = recipe.cluster_modality == "both"
    said: list[Any] = [None]
    if state.is_main_process:
        kept = labels[:, 0] >= 0
        tokens = pairs.tokens(sample[kept]).numpy()
        clusters = (recipe.num_clusters,) * (2 if both else 1)
        said = [CaptionLabels(tokens, labels[kept, 0], clusters, pad_id, seed)]
    by_captions: CaptionLabels = broadcast_object_list(said)[0]
    first, end = (
        len(pairs) * rank // state.num_processes
        for rank in (state.process_index, state.process_index + 1)
    )
    guessed = []
    main = state.is_main_process
    with tqdm(
        total=end - first, desc="reading captions", unit="caption", delay=2, disable=not main
    ) as bar:
        for start in range(first, end, PIECE_ROWS):
            numbers = np.arange(start, min(start + PIECE_ROWS, end))
            guessed.append(by_captions.guess(pairs.tokens(numbers).numpy()))
            bar.update(len(numbers))
    whole = np.concatenate(gather_object(guessed))[:, None]
    if not main:
        return whole, {}
    whole[sample] = labels
    names = ("text", "image") if both else (recipe.cluster_modality,)
    agreement = dict(zip(names, by_captions.agreement, strict=True))
    shares = " and ".join(f"{share:.0%} of {name}" for name, share in agreement.items())
    print(
        f"{len(pairs) - len(sample)} of {len(pairs)} pairs get their clusters for the first stage"
        f" by their captions, which tell {shares} clusters right",
        file=sys.stderr,
    )
    return whole, agreement


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
