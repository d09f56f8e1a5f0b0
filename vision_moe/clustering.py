"""Accumulated clusters of multistage contrastive learning (CLIP-MoE, arXiv 2409.19291, 3.1).

Before stage s, image and text features of the model of stage s-1 are clustered apart, K clusters
each; a pair's stage label is ``K * text cluster + image cluster``, and a pair's accumulated cluster
is the whole sequence of its stage labels.  Labels are kept as one column a stage, coarse to fine,
so that a prefix of the columns is the coarser cluster of an earlier stage.

Features are read in pieces, from memory or from :class:`vision_moe.feature_shards.FeatureShards`.

Legend: M pairs, D feature width, S stages so far, K clusters a modality.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from vision_moe.errors import InputError
from vision_moe.feature_shards import MappedRows

Features = np.ndarray | MappedRows

#: Rows that the centers start from; of as many pairs or fewer, all.
NUM_START_ROWS = 65_536
#: A mini-batch is of so many rows, in runs of so many that lie side by side on the disk.
BATCH_ROWS, RUN_ROWS = 4096, 256


def cluster_features(features: Features, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster features by the angle between them, with mini-batch k-means.

    The centers start from a sample and then see every row once, in mini-batches of random runs.

    Args:
        features: ``(M, D)``, of any norm; a row of zeros is one of a pair that is left out.
        num_clusters: K.
        seed: Of the sample, the initial centers and the mini-batches.

    Returns:
        ``(M,)`` cluster indices in ``[0, K)``, -1 for what is left out, in the smallest integers.

    Raises:
        InputError: Fewer features than clusters.
    """
    rng = np.random.default_rng(seed)
    size = min(len(features), NUM_START_ROWS)
    sample = np.sort(rng.choice(len(features), size, replace=False))
    rows = _directions(features, sample)
    if len(rows) < num_clusters:
        raise InputError(f"cannot make {num_clusters} clusters of {len(rows)} pairs")
    kmeans = MiniBatchKMeans(num_clusters, random_state=seed, batch_size=BATCH_ROWS, n_init=3)
    kmeans.fit(rows)
    if len(sample) < len(features):
        for numbers in _random_runs(len(features), rng):
            kmeans.partial_fit(_directions(features, numbers))
    labels = np.full(len(features), -1, np.min_scalar_type(-num_clusters))
    for start in range(0, len(features), NUM_START_ROWS):
        numbers = np.arange(start, min(start + NUM_START_ROWS, len(features)))
        values = features[numbers].astype(np.float32)
        kept = values.any(axis=1)
        if kept.any():
            labels[numbers[kept]] = kmeans.predict(_unit(values[kept]))
    return labels


def _random_runs(num_rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """All row numbers once, ascending in each mini-batch."""
    runs = rng.permutation(-(-num_rows // RUN_ROWS))
    for chosen in np.array_split(runs, max(1, num_rows // BATCH_ROWS)):
        numbers = np.sort(chosen)[:, None] * RUN_ROWS + np.arange(RUN_ROWS)
        yield numbers[numbers < num_rows]


def _directions(features: Features, numbers: np.ndarray) -> np.ndarray:
    """The rows of ``numbers`` that are not zero, L2-normalised."""
    rows = features[numbers].astype(np.float32)
    return _unit(rows[rows.any(axis=1)])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def stage_labels(
    image_features: Features,
    text_features: Features,
    num_clusters: int,
    seed: int,
    modality: Literal["both", "image", "text"] = "both",
) -> np.ndarray:
    """Label every pair by its text and image cluster: ``c = K * c_text + c_image``, ``(M,)``; or by
    the cluster of one ``modality`` alone; -1 for a pair that is left out."""
    if modality == "image":
        return cluster_features(image_features, num_clusters, seed + 1)
    text = cluster_features(text_features, num_clusters, seed)
    if modality == "text":
        return text
    image = cluster_features(image_features, num_clusters, seed + 1)
    labels = text.astype(np.min_scalar_type(-(num_clusters**2)))  # a byte, for K up to 11
    labels *= num_clusters
    labels += image
    labels[(text < 0) | (image < 0)] = -1
    return labels


def accumulate_labels(labels: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """Append a stage's labels ``(M,)`` to those of the S stages before: ``(M, S + 1)``."""
    column = new[:, None]
    return column if labels is None else np.concatenate([labels, column], axis=1)


def num_occupied_clusters(labels: np.ndarray) -> list[int]:
    """How many accumulated clusters hold a pair after each stage (the paper: 9, 81, ~700)."""
    widths = labels.max(axis=0, initial=0).astype(np.int64) + 1
    seen = [np.empty(0, np.int64) for _ in widths]
    for start in range(0, len(labels), NUM_START_ROWS):
        rows = labels[start : start + NUM_START_ROWS]
        code = np.zeros(int((rows >= 0).all(axis=1).sum()), np.int64)
        for depth, column in enumerate(rows[(rows >= 0).all(axis=1)].T):
            code = code * widths[depth] + column
            seen[depth] = np.union1d(seen[depth], code)
    return [len(codes) for codes in seen]
