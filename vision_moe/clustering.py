"""Accumulated clusters of multistage contrastive learning (CLIP-MoE, arXiv 2409.19291, 3.1).

Before stage s, image and text features of the model of stage s-1 are clustered apart, K clusters
each; a pair's stage label is ``K * text cluster + image cluster``, and a pair's accumulated cluster
is the whole sequence of its stage labels.  Labels are kept as one column a stage, coarse to fine,
so that a prefix of the columns is the coarser cluster of an earlier stage.

Legend: M pairs, D feature width, S stages so far, K clusters a modality.
"""

from __future__ import annotations

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from vision_moe.errors import InputError


def cluster_features(features: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster L2-normalised features by mini-batch k-means.

    Args:
        features: ``(M, D)``, of any norm but zero.
        num_clusters: K.
        seed: Of the initial centers and of the mini-batches.

    Returns:
        ``(M,)`` int64 cluster indices in ``[0, K)``.

    Raises:
        InputError: Fewer features than clusters.
    """
    if len(features) < num_clusters:
        raise InputError(f"cannot make {num_clusters} clusters of {len(features)} pairs")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    kmeans = MiniBatchKMeans(num_clusters, random_state=seed, batch_size=4096, n_init=3)
    return kmeans.fit_predict(unit.astype(np.float32)).astype(np.int64)


def stage_labels(
    image_features: np.ndarray, text_features: np.ndarray, num_clusters: int, seed: int
) -> np.ndarray:
    """Label every pair by its text and image cluster: ``c = K * c_text + c_image``, ``(M,)``."""
    text = cluster_features(text_features, num_clusters, seed)
    image = cluster_features(image_features, num_clusters, seed + 1)
    return num_clusters * text + image


def accumulate_labels(labels: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """Append a stage's labels ``(M,)`` to those of the S stages before: ``(M, S + 1)``."""
    column = new[:, None]
    return column if labels is None else np.concatenate([labels, column], axis=1)


def num_occupied_clusters(labels: np.ndarray) -> list[int]:
    """How many accumulated clusters hold a pair after each stage (the paper: 9, 81, ~700)."""
    return [len(np.unique(labels[:, : depth + 1], axis=0)) for depth in range(labels.shape[1])]
