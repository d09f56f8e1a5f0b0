"""Cluster labels of multistage contrastive learning, and their accumulation."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_moe import (
    InputError,
    accumulate_labels,
    clustering,
    num_occupied_clusters,
    stage_labels,
)
from vision_moe.clustering import cluster_features
from vision_moe.feature_shards import FeatureShards

K = 3


def groups(of: np.ndarray, seed: int = 0) -> np.ndarray:
    """Features ``(M, 8)`` around one axis for each value of ``of``, of very different norms."""
    rng = np.random.default_rng(seed)
    features = np.eye(8)[of] + 0.01 * rng.standard_normal((len(of), 8))
    return features * rng.uniform(0.1, 100, (len(of), 1))


def same_partition(one: np.ndarray, two: np.ndarray) -> bool:
    return len(np.unique(np.stack([one, two]), axis=1).T) == len(np.unique(one)) == len(
        np.unique(two)
    )


@pytest.fixture
def image_group() -> np.ndarray:
    return np.random.default_rng(1).integers(K, size=200)


@pytest.fixture
def text_group() -> np.ndarray:
    return np.random.default_rng(2).integers(K, size=200)


def test_clusters_are_found_whatever_the_norms(image_group: np.ndarray) -> None:
    assert same_partition(cluster_features(groups(image_group), K, seed=0), image_group)


def test_label_is_k_times_text_plus_image(
    image_group: np.ndarray, text_group: np.ndarray
) -> None:
    labels = stage_labels(groups(image_group), groups(text_group), K, seed=0)
    assert same_partition(labels // K, text_group)
    assert same_partition(labels % K, image_group)


def test_labels_lie_below_k_squared(image_group: np.ndarray, text_group: np.ndarray) -> None:
    labels = stage_labels(groups(image_group), groups(text_group), K, seed=0)
    assert set(labels) == set(range(K * K))


def test_labels_are_bytes_as_long_as_they_fit(image_group: np.ndarray) -> None:
    features = groups(image_group)
    assert stage_labels(features, features, 11, seed=0).dtype == np.int8
    labels = stage_labels(features, features, 12, seed=0)
    assert labels.dtype == np.int16 and labels.min() >= 0 and labels.max() < 144


def test_labels_depend_on_the_seed_alone() -> None:
    features = np.random.default_rng(0).standard_normal((300, 8))
    first, second = (stage_labels(features, -features, K, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_fewer_pairs_than_clusters_are_refused() -> None:
    with pytest.raises(InputError, match="3 clusters of 2 pairs"):
        cluster_features(np.eye(2), K, seed=0)


def test_a_row_of_zeros_is_left_out() -> None:
    features = np.concatenate([np.zeros((1, 8)), groups(np.arange(20) % K)])
    labels = cluster_features(features, K, seed=0)
    assert labels[0] == -1 and set(labels[1:]) == set(range(K))
    assert stage_labels(features, np.ones_like(features), 1, seed=0).tolist() == [-1] + [0] * 20


def test_accumulated_clusters_are_counted_without_what_is_left_out() -> None:
    assert num_occupied_clusters(np.array([[0, 1], [0, 2], [-1, -1]])) == [1, 2]


def test_rows_beyond_the_sample_join_its_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "NUM_CENTER_ROWS", 50)
    monkeypatch.setattr(clustering, "NUM_CENTER_ROWS_EACH", 5)
    monkeypatch.setattr(clustering, "PIECE_ROWS", 64)
    of = np.random.default_rng(1).integers(K, size=1000)
    assert same_partition(cluster_features(groups(of), K, seed=0), of)


def test_features_on_disk_give_the_labels_of_those_in_memory(
    image_group: np.ndarray, tmp_path: Path
) -> None:
    image, text = groups(image_group), groups(image_group, seed=1)
    shards = FeatureShards(tmp_path, len(image))
    for number in range(shards.num_shards):
        rows = shards.numbers(number)
        shards.write(number, image[rows], text[rows], {})
    expected = stage_labels(image, text, K, seed=0)
    np.testing.assert_array_equal(stage_labels(shards.image, shards.text, K, 0), expected)


columns = st.lists(
    st.lists(st.integers(0, K * K - 1), min_size=12, max_size=12), min_size=1, max_size=4
)


def accumulated(stages: list[list[int]]) -> np.ndarray:
    labels = None
    for stage in stages:
        labels = accumulate_labels(labels, np.array(stage))
    assert labels is not None
    return labels


@settings(deadline=None)
@given(columns)
def test_accumulated_labels_keep_every_stage_in_order(stages: list[list[int]]) -> None:
    np.testing.assert_array_equal(accumulated(stages), np.array(stages).T)


@settings(deadline=None)
@given(columns)
def test_accumulated_clusters_are_those_of_the_papers_sum(stages: list[list[int]]) -> None:
    """``y = y * K^2 + c`` numbers the rows of the labels."""
    sums = np.zeros(12, dtype=int)
    for depth, stage in enumerate(stages):
        sums = sums * K * K + np.array(stage)
        assert num_occupied_clusters(accumulated(stages))[depth] == len(set(sums.tolist()))


def test_clusters_of_many_pairs_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(9, size=(200, 2)).astype(np.int8)
    expected = num_occupied_clusters(labels)
    assert expected == [9, len(np.unique(labels, axis=0))]
    monkeypatch.setattr(clustering, "PIECE_ROWS", 7)
    assert num_occupied_clusters(labels) == expected


@settings(deadline=None)
@given(columns)
def test_clusters_only_split(stages: list[list[int]]) -> None:
    numbers = num_occupied_clusters(accumulated(stages))
    assert numbers == sorted(numbers)
