"""Diversified multiplet upcycling of a tiny CLIP, all of it, from its recipe."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import vision_moe
from train import contrastive, dmu, pair_labels, run_recipe
from train.config import load_recipe, parse_recipe
from train.dmu import run_stage
from train.recipe import UpcycleRecipe
from vision_moe import InputError

K = 2
STAGE = {"steps": 3, "batch_size": 8, "lr": 1e-3, "warmup_steps": 1, "logit_scale": 100}


def recipe_of(out: Path, model: Path, **changes: Any) -> UpcycleRecipe:
    content = {
        "kind": "upcycle",
        "out": str(out),
        "model": str(model),
        "data": {"num_pairs": 48, "caption": "detailed"},
        "num_experts": 3,
        "num_clusters": K,
        "features": "pass",
        "stage": STAGE,
        "router": {"steps": 3, "batch_size": 8, "lr": 1e-2, "warmup_steps": 1, "logit_scale": 100},
        "precision": "fp32",
        **changes,
    }
    recipe = parse_recipe(content, "test")
    assert isinstance(recipe, UpcycleRecipe)
    return recipe


@pytest.fixture(scope="module")
def upcycled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(recipe_of(tmp_path_factory.mktemp("upcycled") / "moe", base))


@pytest.fixture
def copied(upcycled: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(upcycled, tmp_path / "moe")
    shutil.copytree(stage_folder(upcycled), tmp_path / "moe.stages")
    return tmp_path / "moe"


def stage_folder(out: Path) -> Path:
    return Path(f"{out}.stages")


def expert(out: Path, number: int) -> dict[str, Tensor]:
    return load_file(stage_folder(out) / f"stage_{number}" / "expert.safetensors")


def labels(out: Path, number: int) -> np.ndarray:
    stored = load_file(stage_folder(out) / f"stage_{number}" / "labels.safetensors")
    return stored["labels"].numpy()


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


# --- the result ----------------------------------------------------------------------------------


def test_result_is_a_mixture_that_loads(upcycled: Path) -> None:
    assert vision_moe.load(upcycled).config.moe == {
        "num_experts": 3, "top_k": 2, "vision_layers": [0, 1], "text_layers": [0, 1],
    }  # fmt: skip


def experts_of(out: Path, number: int) -> dict[str, Tensor]:
    """Weights of one expert of the result, under the names of a dense model."""
    return {
        f"{name}.{key}": value
        for name, layer in vision_moe.moe_layers(vision_moe.load(out)).items()
        for key, value in layer.experts[number].state_dict().items()
    }


def test_expert_0_is_the_base(upcycled: Path, base: Path) -> None:
    assert_equal(experts_of(upcycled, 0), vision_moe.ffn_state_dict(vision_moe.load(base)))


@pytest.mark.parametrize("number", [1, 2])
def test_expert_is_its_stage(upcycled: Path, number: int) -> None:
    assert_equal(experts_of(upcycled, number), expert(upcycled, number))


def test_experts_can_be_put_together_nearer_to_the_base_and_their_mean(
    copied: Path, upcycled: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copied)
    started = names_of_trained(monkeypatch)
    run_recipe(recipe_of(copied, base, expert_spread=0.25, base_share=0.5))
    assert started == ["router tuning"]  # of the stages that there are
    whole = [experts_of(upcycled, number) for number in range(3)]
    for number in range(3):
        for name, weight in experts_of(copied, number).items():
            mean = sum(one[name] for one in whole) / 3
            pulled = 0.25 * whole[number][name] + 0.75 * mean
            torch.testing.assert_close(weight, 0.5 * pulled + 0.5 * whole[0][name])


def test_everything_but_the_feed_forward_networks_is_the_bases(
    upcycled: Path, base: Path
) -> None:
    before = vision_moe.load(base).state_dict()
    shared = before.keys() - vision_moe.ffn_state_dict(vision_moe.load(base)).keys()
    after = vision_moe.load(upcycled).state_dict()
    assert_equal({name: before[name] for name in shared}, {name: after[name] for name in shared})


def test_every_feed_forward_parameter_trains_in_a_stage(upcycled: Path, base: Path) -> None:
    before = vision_moe.ffn_state_dict(vision_moe.load(base))
    assert not [name for name, value in expert(upcycled, 1).items() if value.equal(before[name])]


def test_routers_train(upcycled: Path) -> None:
    log = json.loads((upcycled / "training_log.json").read_text())
    assert len(log["router_change"]) == 4
    assert all(change > 0 for change in log["router_change"].values())


def test_resolved_recipe_is_written_and_gives_the_same(upcycled: Path, base: Path) -> None:
    assert load_recipe(upcycled / "recipe.yaml") == recipe_of(upcycled, base)


# --- the stages ----------------------------------------------------------------------------------


class Watch:
    """Which parameters each training run changes, and its batches."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.batches: list[list[np.ndarray]] = []
        self.starts: list[dict[str, Tensor]] = []

    def __call__(
        self, clip: Any, parameters: Any, pairs: Any, batches: Any, training: Any, **more: Any
    ) -> Any:
        before = {name: p.detach().clone() for name, p in clip.named_parameters()}
        history = contrastive.train_contrastive(
            clip, parameters, pairs, batches, training, **more
        )
        self.changed.append(
            {name for name, p in clip.named_parameters() if not p.equal(before[name])}
        )
        self.batches.append(list(batches))
        self.starts.append(before)
        return history


@pytest.fixture(scope="module")
def watch(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch()
        patch.setattr(dmu, "train_contrastive", watch)
        run_recipe(
            recipe_of(tmp_path_factory.mktemp("watched") / "moe", base, stage_init="base")
        )
        yield watch


def test_only_feed_forward_parameters_change_in_a_stage(watch: Watch, base: Path) -> None:
    names = set(vision_moe.ffn_state_dict(vision_moe.load(base)))
    assert watch.changed[0] == names and watch.changed[1] == names


def test_only_routers_change_in_router_tuning(watch: Watch) -> None:
    assert {name.rsplit(".", 2)[1] for name in watch.changed[2]} == {"router"}


def test_stages_from_the_base_start_at_the_base(watch: Watch, base: Path) -> None:
    start = dict(vision_moe.load(base).named_parameters())
    for before in watch.starts[:2]:
        assert_equal(before, {name: p.detach() for name, p in start.items()})


def test_stages_from_the_previous_one_start_there(
    base: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copied)
    shutil.rmtree(stage_folder(copied) / "stage_2")
    watch = Watch()
    monkeypatch.setattr(dmu, "train_contrastive", watch)
    run_recipe(recipe_of(copied, base))
    stage_1 = expert(copied, 1)
    assert_equal({name: watch.starts[0][name] for name in stage_1}, stage_1)


def test_batches_come_from_one_cluster(watch: Watch) -> None:
    for batch in watch.batches[0]:
        assert len(batch) == 8 and len(set(batch.tolist())) == 8


def test_first_labels_number_the_clusters_of_both_modalities(upcycled: Path) -> None:
    assert labels(upcycled, 1).shape == (48, 1)
    assert set(np.unique(labels(upcycled, 1))) <= set(range(K * K))


def test_later_labels_continue_the_earlier(upcycled: Path) -> None:
    assert labels(upcycled, 2).shape == (48, 2)
    np.testing.assert_array_equal(labels(upcycled, 2)[:, :1], labels(upcycled, 1))


def test_log_counts_the_clusters(upcycled: Path) -> None:
    log = json.loads((stage_folder(upcycled) / "stage_2" / "training_log.json").read_text())
    one, two = log["num_clusters"]
    assert 1 < one <= K * K and one <= two <= K**4


def test_log_tells_what_took_how_long(upcycled: Path) -> None:
    log = json.loads((stage_folder(upcycled) / "stage_1" / "training_log.json").read_text())
    assert set(log["seconds"]) == {"features", "clustering", "training"}


def test_broken_stage_neither_encodes_nor_clusters_again(
    base: Path, upcycled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def forbidden(*_: Any) -> None:
        raise AssertionError("encoded again")

    recipe = recipe_of(tmp_path / "moe", base, num_experts=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dmu, "train_contrastive", broken)
        run_recipe(recipe)
    monkeypatch.setattr(pair_labels, "encode_to_shards", forbidden)
    run_recipe(recipe)
    assert_equal(expert(tmp_path / "moe", 1), expert(upcycled, 1))
    log = json.loads((stage_folder(tmp_path / "moe") / "stage_1/training_log.json").read_text())
    assert log["seconds"].keys() == {"features", "clustering", "training"}
    assert [one.name for one in stage_folder(tmp_path / "moe").iterdir()] == ["stage_1"]


def test_unreadable_picture_is_left_out_of_every_batch(base: Path, tmp_path: Path) -> None:
    for number in range(100):
        Image.new("RGB", (32, 32), (2 * number, 255 - number, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "17.png").write_bytes(b"no picture")
    lines = [json.dumps({"image": f"{i}.png", "caption": f"number {i}"}) for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = {"name": "jsonl", "path": str(tmp_path / "pairs.jsonl")}
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmu, "train_contrastive", watch)
        out = run_recipe(recipe_of(tmp_path / "moe", base, data=data, stage=STAGE | {"steps": 13}))
    assert all(17 not in batch for batches in watch.batches for batch in batches)
    assert set(np.concatenate(watch.batches[0])) == set(range(100)) - {17}
    log = json.loads((stage_folder(out) / "stage_2" / "training_log.json").read_text())
    assert list(log["skipped_pairs"]) == ["17"]


# --- once, again, and not at all -----------------------------------------------------------------


def names_of_trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that train from now on, as they start."""
    started: list[str] = []

    def recorded(*arguments: Any, stage: Any, **more: Any) -> Any:
        started.append(stage.name)
        return contrastive.train_contrastive(*arguments, stage=stage, **more)

    monkeypatch.setattr(dmu, "train_contrastive", recorded)
    return started


def test_whole_result_is_not_made_again(
    upcycled: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = names_of_trained(monkeypatch)
    result = run_stage(recipe_of(upcycled, base), "router tuning")
    assert result.skipped and not started


def test_skipped_result_reports_the_time_of_all_stages(upcycled: Path, base: Path) -> None:
    records = [
        json.loads((folder / "stage.json").read_text())["seconds"]
        for folder in (upcycled, *sorted(stage_folder(upcycled).iterdir()))
    ]
    seconds = run_stage(recipe_of(upcycled, base), "router tuning").seconds
    assert seconds == pytest.approx(sum(records), abs=0.01)


def test_whole_stages_are_not_run_again(
    copied: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copied)
    started = names_of_trained(monkeypatch)
    run_recipe(recipe_of(copied, base))
    assert started == ["router tuning"]


def test_removed_stage_is_made_again_as_it_was(
    copied: Path, upcycled: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copied)
    shutil.rmtree(stage_folder(copied) / "stage_1")
    started = names_of_trained(monkeypatch)
    run_recipe(recipe_of(copied, base))
    assert started == ["contrastive stage 1", "router tuning"]
    assert_equal(expert(copied, 1), expert(upcycled, 1))


def test_more_experts_go_on_from_the_stages_there_are(
    copied: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copied)
    started = names_of_trained(monkeypatch)
    run_recipe(recipe_of(copied, base, num_experts=4))
    assert started == ["contrastive stage 3", "router tuning"]


def test_another_configuration_is_refused(upcycled: Path, base: Path) -> None:
    with pytest.raises(InputError, match="'num_clusters' is 2 there and 3 now"):
        run_recipe(recipe_of(upcycled, base, num_clusters=3))


def test_stages_of_another_configuration_are_refused(copied: Path, base: Path) -> None:
    shutil.rmtree(copied)
    with pytest.raises(InputError, match="'global_share' is 0.0 there and 0.5 now"):
        run_recipe(recipe_of(copied, base, global_share=0.5))


def test_another_base_is_refused(upcycled: Path, base: Path, tmp_path: Path) -> None:
    model = vision_moe.load(base)
    model.logit_scale.data += 1
    vision_moe.save(model, tmp_path / "other")
    with pytest.raises(InputError, match="what it was made from has changed"):
        run_recipe(recipe_of(upcycled, tmp_path / "other"))


def test_same_seed_gives_the_same_bits(upcycled: Path, base: Path, tmp_path: Path) -> None:
    again = run_recipe(recipe_of(tmp_path / "again", base))
    assert_equal(vision_moe.load(again).state_dict(), vision_moe.load(upcycled).state_dict())


def test_top_k_beyond_the_experts_is_refused_before_anything_trains(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = names_of_trained(monkeypatch)
    with pytest.raises(InputError, match="'top_k' is 4, but there are 3 experts"):
        run_recipe(recipe_of(tmp_path / "out", base, top_k=4))
    assert not started


def test_mixture_is_not_upcycled_again(upcycled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a mixture of experts already"):
        run_recipe(recipe_of(tmp_path / "out", upcycled))


def test_fewer_pairs_than_clusters_are_refused(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "out", base, data={"num_pairs": 3}, num_clusters=4)
    with pytest.raises(InputError, match="4 clusters of 3 pairs"):
        run_recipe(recipe)
