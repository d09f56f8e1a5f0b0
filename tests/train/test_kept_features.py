"""Stages whose clusters come from the features that training computes anyway."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vision_moe
from tests.train.test_dmu import (
    STAGE,
    K,
    Watch,
    assert_equal,
    expert,
    labels,
    recipe_of,
    stage_folder,
)
from train import contrastive, dmu, encoding, engine, pair_labels, run_recipe
from train.dmu import run_stage
from train.pairs import load_pairs
from train.recipe import UpcycleRecipe
from vision_moe import InputError
from vision_moe.clustering import cluster_features

EPOCH = STAGE | {"steps": 6}                               # all 48 pairs


def kept_recipe(out: Path, base: Path, **changes: Any) -> UpcycleRecipe:
    return recipe_of(out, base, **{"features": "training", "stage": EPOCH, **changes})


@pytest.fixture(scope="module")
def kept(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(kept_recipe(tmp_path_factory.mktemp("kept") / "moe", base))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of pairs that are encoded from now on."""
    numbers: list[int] = []

    def counted(model: Any, pairs: Any, some: np.ndarray, *more: Any) -> Any:
        numbers.extend(some.tolist())
        return original(model, pairs, some, *more)

    original = encoding.encode
    monkeypatch.setattr(encoding, "encode", counted)
    return numbers


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 pairs."""
    monkeypatch.setattr(pair_labels, "MIN_SAMPLE", 16)
    monkeypatch.setattr(pair_labels, "MIN_SAMPLE_EACH", 1)


def test_few_pairs_are_encoded_once_before_the_first_stage(
    base: Path, tmp_path: Path, encoded: list[int]
) -> None:
    run_recipe(kept_recipe(tmp_path / "moe", base))
    assert sorted(encoded) == list(range(48))


@pytest.mark.usefixtures("small_sample")
def test_of_more_pairs_a_sample_is_encoded(
    base: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_labels, "PIECE_ROWS", 20)
    run_recipe(kept_recipe(tmp_path / "moe", base))
    assert len(encoded) == len(set(encoded)) == 16
    first = labels(tmp_path / "moe", 1)
    assert first.shape == (48, 1) and set(np.unique(first)) <= set(range(K * K))
    assert len(np.unique(first[sorted(set(range(48)) - set(encoded))])) > 1
    log = json.loads((stage_folder(tmp_path / "moe") / "stage_1/training_log.json").read_text())
    assert log["agreement"].keys() == {"text", "image"}
    assert [one.name for one in stage_folder(tmp_path / "moe").iterdir()].count("stage_1") == 1


@pytest.mark.usefixtures("small_sample")
def test_sample_has_the_clusters_of_its_features(base: Path, tmp_path: Path) -> None:
    """Of one modality too; captions tell of all others."""
    recipe = kept_recipe(tmp_path / "moe", base, cluster_modality="text", num_experts=2)
    sample = pair_labels._sample(recipe, 48, recipe.seed + 1)
    assert sample is not None
    run_recipe(recipe)
    model = vision_moe.load(base)
    _, text = encoding.encode_all(model, load_pairs(recipe.data, model, recipe.seed), "fp32")
    expected = cluster_features(text.numpy().astype(np.float16)[sample], K, recipe.seed + 1)
    np.testing.assert_array_equal(labels(tmp_path / "moe", 1)[sample, 0], expected)


@pytest.mark.usefixtures("small_sample")
def test_broken_first_stage_neither_samples_nor_guesses_again(
    base: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (
        kept_recipe(tmp_path / name, base, save_steps=2, num_experts=2) for name in ("one", "two")
    )
    run_recipe(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_at(patch, 3)
        run_recipe(broken)
    encoded.clear()
    run_recipe(broken)
    assert not encoded
    np.testing.assert_array_equal(labels(tmp_path / "two", 1), labels(tmp_path / "one", 1))
    assert_equal(expert(tmp_path / "two", 1), expert(tmp_path / "one", 1))


def test_pairs_that_training_did_not_see_are_encoded(
    base: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    monkeypatch.setattr(dmu, "train_contrastive", watch)
    run_recipe(kept_recipe(tmp_path / "moe", base, stage=STAGE, num_experts=2))
    unseen = set(range(48)) - set(np.concatenate(watch.batches[0]).tolist())
    assert len(unseen) == 24 and sorted(encoded[48:]) == sorted(unseen)


def test_clusters_are_those_of_a_pass_where_the_model_stands_still(
    base: Path, tmp_path: Path
) -> None:
    still = EPOCH | {"lr": 1e-12}
    for features in ("pass", "training"):
        run_recipe(kept_recipe(tmp_path / features, base, features=features, stage=still))
    expected = labels(tmp_path / "pass", 2)
    assert len(np.unique(expected, axis=0)) > 4
    np.testing.assert_array_equal(labels(tmp_path / "training", 2), expected)


def test_kept_features_are_in_no_result(kept: Path) -> None:
    assert sorted(one.name for one in stage_folder(kept).iterdir()) == ["stage_1", "stage_2"]
    files = [one.name for one in (stage_folder(kept) / "stage_1").iterdir()]
    assert sorted(files) == [
        "expert.safetensors", "labels.safetensors", "next_labels.safetensors", "stage.json",
        "training_log.json",
    ]  # fmt: skip


def broken_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = engine.ProgressBar.on_step_end

    def kill(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == step:
            raise KeyboardInterrupt

    patch.setattr(engine.ProgressBar, "on_step_end", kill)


def test_broken_stage_goes_on_to_the_same_bits(
    base: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = kept_recipe(tmp_path / "moe", base, save_steps=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        broken_at(patch, 5)
        run_recipe(recipe)
    run_recipe(recipe)
    for number in (1, 2):
        np.testing.assert_array_equal(labels(tmp_path / "moe", number), labels(kept, number))
        assert_equal(expert(tmp_path / "moe", number), expert(kept, number))


def test_clustering_that_breaks_off_does_not_cost_the_training(
    base: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = kept_recipe(tmp_path / "moe", base, save_steps=2)

    def full(*_: Any) -> None:
        raise InputError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="the disk is full"):
        patch.setattr(dmu, "labels_of_next", full)
        run_recipe(recipe)
    steps: list[int] = []

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        steps.append(1)
        return original(self, *arguments, **options)

    original = contrastive.ContrastiveModel.forward
    monkeypatch.setattr(contrastive.ContrastiveModel, "forward", forward)
    run_stage(recipe, "router tuning")
    assert len(steps) == 6 + 3                             # of the second stage and the router
    np.testing.assert_array_equal(labels(tmp_path / "moe", 2), labels(kept, 2))


@pytest.mark.parametrize("sampled", [100, 64])
def test_unreadable_picture_is_left_out_of_every_stage(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: int
) -> None:
    """Found by the first pass, or in the training where that does not come by it."""
    monkeypatch.setattr(pair_labels, "MIN_SAMPLE", sampled)
    monkeypatch.setattr(pair_labels, "MIN_SAMPLE_EACH", 1)
    for number in range(100):
        Image.new("RGB", (32, 32), (2 * number, 255 - number, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "17.png").write_bytes(b"no picture")
    lines = [json.dumps({"image": f"{i}.png", "caption": f"number {i}"}) for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = {"name": "jsonl", "path": str(tmp_path / "pairs.jsonl")}
    recipe = kept_recipe(tmp_path / "moe", base, data=data, stage=STAGE | {"steps": 13})
    sample = pair_labels._sample(recipe, 100, recipe.seed + 1)
    assert sample is None or 17 not in sample
    out = run_recipe(recipe)
    assert np.flatnonzero((labels(out, 2) < 0).any(axis=1)).tolist() == [17]
    log = json.loads((stage_folder(out) / "stage_2" / "training_log.json").read_text())
    assert list(log["skipped_pairs"]) == ["17"]
