"""Features on disk: what is read is what was written, shard by shard."""

from pathlib import Path

import numpy as np
import pytest

from vision_moe import InputError, feature_shards
from vision_moe.feature_shards import FeatureShards


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1000, 6))


@pytest.fixture
def shards(tmp_path: Path, features: np.ndarray) -> FeatureShards:
    """1,000 pairs in shards of 256 rows."""
    shards = FeatureShards(tmp_path / "features", 1000)
    for number in range(shards.num_shards):
        rows = shards.numbers(number)
        skipped = {258: "no picture"} if number == 1 else {}
        shards.write(number, features[rows], -features[rows], skipped)
    return shards


def test_rows_are_the_directions_of_the_features(
    shards: FeatureShards, features: np.ndarray
) -> None:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    numbers = np.array([0, 255, 256, 700, 999])
    # Worst error seen: 2.4e-4, half a step of fp16 below 1.
    np.testing.assert_allclose(shards.image[numbers], unit[numbers], atol=2.5e-4)
    np.testing.assert_allclose(shards.text[numbers], -unit[numbers], atol=2.5e-4)
    assert shards.image.shape == (1000, 6) and len(shards.image) == 1000


def test_rows_are_halves_on_disk(shards: FeatureShards) -> None:
    assert shards.image[np.arange(1000)].dtype == np.float16
    assert isinstance(shards.image.shards[0], np.memmap)


def test_no_rows_of_none(shards: FeatureShards) -> None:
    assert shards.image[np.arange(0)].shape == (0, 6)


def test_skipped_pairs_are_listed(shards: FeatureShards) -> None:
    assert shards.skipped() == {258: "no picture"}


def test_shard_is_whole_only_with_its_last_file(shards: FeatureShards) -> None:
    assert all(shards.is_whole(number) for number in range(4))
    (shards.folder / "skipped-00002.json").unlink()
    assert [number for number in range(4) if not shards.is_whole(number)] == [2]


def test_shards_grow_with_the_data_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FeatureShards(tmp_path, 64 * 1000).rows == 1000
    assert FeatureShards(tmp_path, 10**8).rows == feature_shards._MAX_ROWS


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_feature_that_is_no_number_is_named(tmp_path: Path, value: float) -> None:
    shards = FeatureShards(tmp_path / "features", 300)
    image = np.ones((44, 3))
    image[2, 1] = value
    with pytest.raises(InputError, match="image feature of pair 258 is not a number"):
        shards.write(1, image, np.ones((44, 3)), {})
    assert not shards.is_whole(1)


def test_row_of_zeros_stays_one_in_half_precision(tmp_path: Path) -> None:
    shards = FeatureShards(tmp_path, 2)
    half = np.array([[0, 0], [3, 4]], np.float16)
    shards.write(0, half, half, {0: "unreadable"})
    np.testing.assert_allclose(shards.image[np.arange(2)], [[0, 0], [0.6, 0.8]], atol=2.5e-4)


def test_features_that_come_by_and_by_are_where_they_belong(
    tmp_path: Path, features: np.ndarray
) -> None:
    shards = FeatureShards(tmp_path, 1000)
    order = np.random.default_rng(1).permutation(1000)
    for numbers in (order[:500], order[400:900]):          # some of them twice
        shards.put(numbers, features[numbers], -features[numbers])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for number in range(shards.num_shards):
        kept, rows = shards.kept(number), shards.numbers(number)
        assert kept is not None
        came = np.isin(rows, order[:900])
        np.testing.assert_array_equal(kept[0].any(axis=1), came)
        np.testing.assert_allclose(kept[0][came], unit[rows[came]], atol=2.5e-4)
        np.testing.assert_allclose(kept[1][came], -unit[rows[came]], atol=2.5e-4)


def test_features_that_came_before_a_broken_run_are_kept(
    tmp_path: Path, features: np.ndarray
) -> None:
    for numbers in (np.arange(9), np.arange(9, 20)):
        FeatureShards(tmp_path, 20).put(numbers, features[numbers], features[numbers])
    kept = FeatureShards(tmp_path, 20).kept(0)
    assert kept is not None and kept[0].any(axis=1).all()


def test_what_was_kept_goes_when_its_shard_is_written(shards: FeatureShards) -> None:
    shards.put(np.array([300]), np.ones((1, 6)), np.ones((1, 6)))
    assert shards.kept(1) is not None and shards.kept(0) is None
    shards.write(1, np.ones((256, 6)), np.ones((256, 6)), {})
    assert shards.kept(1) is None


def test_removed_shards_are_gone(shards: FeatureShards) -> None:
    shards.remove()
    assert not shards.folder.exists()
