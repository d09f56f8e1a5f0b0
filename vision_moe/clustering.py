"""Accumulated clusters of multistage contrastive learning (CLIP-MoE, arXiv 2409.19291, 3.1).

Before stage s, image and text features of the model of stage s-1 are clustered apart, K clusters
each; a pair's stage label is ``K * text cluster + image cluster``, and a pair's accumulated cluster
is the whole sequence of its stage labels.  Labels are kept as one column a stage, coarse to fine,
so that a prefix of the columns is the coarser cluster of an earlier stage.

Features are read in pieces, from memory or from :class:`vision_moe.feature_shards.FeatureShards`.

Legend: M pairs, D feature width, S stages so far, K clusters a modality.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from sklearn.cluster import KMeans

from vision_moe.errors import InputError
from vision_moe.feature_shards import MappedRows

Features = np.ndarray | MappedRows

#: Rows that the centers are made of, at least, and for each cluster; of fewer pairs, all.
NUM_CENTER_ROWS, NUM_CENTER_ROWS_EACH = 16_384, 256
#: Rows that are read at a time.
PIECE_ROWS = 65_536


def cluster_features(features: Features, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster features by the angle between them: k-means on a sample, which all rows then join in
    one pass.

    A center is the mean of thousands of rows of the sample: those of all would hardly differ, and
    reading them would take longer than all else.

    Args:
        features: ``(M, D)``, of any norm; a row of zeros is one of a pair that is left out.
        num_clusters: K.
        seed: Of the sample and the initial centers.

    Returns:
        ``(M,)`` cluster indices in ``[0, K)``, -1 for what is left out, in the smallest integers.

    Raises:
        InputError: Fewer features than clusters.
    """
    rng = np.random.default_rng(seed)
    size = min(len(features), max(NUM_CENTER_ROWS, NUM_CENTER_ROWS_EACH * num_clusters))
    rows = _directions(features, np.sort(rng.choice(len(features), size, replace=False)))
    if len(rows) < num_clusters:
        raise InputError(f"cannot make {num_clusters} clusters of {len(rows)} pairs")
    kmeans = KMeans(num_clusters, random_state=seed, n_init=3).fit(rows)
    labels = np.full(len(features), -1, np.min_scalar_type(-num_clusters))
    for start in range(0, len(features), PIECE_ROWS):
        numbers = np.arange(start, min(start + PIECE_ROWS, len(features)))
        values = features[numbers].astype(np.float32)
        kept = values.any(axis=1)
        if kept.any():
            labels[numbers[kept]] = kmeans.predict(_unit(values[kept]))
    return labels


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
    for start in range(0, len(labels), PIECE_ROWS):
        rows = labels[start : start + PIECE_ROWS]
        code = np.zeros(int((rows >= 0).all(axis=1).sum()), np.int64)
        for depth, column in enumerate(rows[(rows >= 0).all(axis=1)].T):
            code = code * widths[depth] + column
            seen[depth] = np.union1d(seen[depth], code)
    return [len(codes) for codes in seen]
