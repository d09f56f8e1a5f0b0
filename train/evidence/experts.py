"""Are a cell's experts diverse: the diagnosis of :mod:`mllm.diagnosis`, and the suppression test.

M pairs, D feature width, S stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.diagnosis import diagnose, scenes_data
from mllm.scoring.statistics import paired_bootstrap_interval
from train.clip_evaluation import HeldOutScenes
from train.encoding import encode_all
from vision_moe import (
    CLIPMoEModel,
    accumulate_labels,
    load,
    num_occupied_clusters,
    stage_labels,
)


def examine_experts(
    clip: Path, control: Path | None, stages: Iterable[CLIPMoEModel], scenes: HeldOutScenes,
    num_clusters: int, seed: int, num_scenes: int,
) -> dict[str, Any]:
    """Everything about the experts of a CLIP-MoE, JSON-able.

    Args:
        clip: Its folder.
        control: That of experts which differ in their seeds alone.
        stages: The dense base, then the dense CLIP of each stage, as it was trained.
        scenes: Held out; for the suppression test.
        num_clusters: K of the stages.
        seed: Of clusters, scenes and intervals.
        num_scenes: For the diagnosis.
    """  # fmt: skip
    model = load(clip)
    size = model.config.vision_config.image_size
    assert isinstance(size, int), "scenes are square"
    data = scenes_data(size, num_scenes, seed)
    diagnosis = diagnose(model, data, None if control is None else load(control), seed=seed)
    return {**diagnosis.as_json(), "suppression": suppression(stages, scenes, num_clusters, seed)}


def suppression(
    stages: Iterable[CLIPMoEModel], scenes: HeldOutScenes, num_clusters: int, seed: int
) -> list[dict[str, float]]:
    """For each stage: R@1 within the clusters of the stages before, of its CLIP and the one
    before; what a cluster's pairs have in common is of no help there.

    Held-out pairs are clustered as a stage clusters its training pairs.
    """
    with torch.inference_mode():
        features = [encode_all(model, scenes.pairs, "fp32") for model in stages]
    labels: np.ndarray | None = None
    found = []
    for stage, (before, after) in enumerate(zip(features, features[1:], strict=False), start=1):
        image, text = before
        new = stage_labels(image.numpy(), text.numpy(), num_clusters, seed + stage)
        labels = accumulate_labels(labels, new)
        hits = [within_clusters(*one, labels) for one in (before, after)]
        entry: dict[str, float] = {
            "stage": stage,
            "num_clusters": num_occupied_clusters(labels)[-1],
            "num_queries": len(hits[0]),
        }
        if len(hits[0]):
            interval = paired_bootstrap_interval(hits[1].tolist(), hits[0].tolist(), seed)
            entry |= {"before": float(hits[0].mean()), "after": float(hits[1].mean()),
                      "low": interval.low, "high": interval.high}  # fmt: skip
        found.append(entry)
    return found


def within_clusters(image: Tensor, text: Tensor, labels: np.ndarray) -> np.ndarray:
    """Whether each pair is found, the mean of both directions, among its own cluster's.

    Args:
        image: ``(M, D)``.
        text: ``(M, D)``.
        labels: ``(M, S)``; pairs with a cluster of their own are left out.
    """
    _, cluster = np.unique(labels, axis=0, return_inverse=True)
    image, text = (torch.nn.functional.normalize(one.float(), dim=-1) for one in (image, text))
    hits = []
    for number in range(cluster.max() + 1):
        members = torch.from_numpy(np.flatnonzero(cluster.reshape(-1) == number))
        if len(members) < 2:
            continue
        similarity = image[members] @ text[members].T
        own = torch.arange(len(members))
        right = (similarity.argmax(0) == own).double() + (similarity.argmax(1) == own).double()
        hits.append(right.numpy() / 2)
    return np.concatenate(hits) if hits else np.zeros(0)
