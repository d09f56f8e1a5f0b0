"""Options of upcycling and its baselines, each on a tiny CLIP from its recipe."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vision_moe
from tests.train.test_dmu import STAGE, Watch, expert, recipe_of, stage_folder
from train import dmu, run_recipe
from train.blocks import moe_config
from train.contrastive import configuration, start_model
from train.dry_run import describe_upcycling
from train.recipe import UpcycleRecipe
from vision_moe import CLIPMoEModel, InputError, LowRankExperts, contrastive_loss

STEPS = 2 * 3 + 3                                          # of two stages and the router


def made(out: Path, base: Path, **changes: Any) -> CLIPMoEModel:
    return vision_moe.load(run_recipe(recipe_of(out, base, **changes)))


def log_of(folder: Path) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((folder / "training_log.json").read_text())
    return log


# --- baselines ------------------------------------------------------------------------------------


def test_direct_fine_tuning_stays_dense_and_takes_as_many_steps(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    model = made(tmp_path / "out", base, method="direct")
    assert model.config.moe is None
    assert watch.changed == [{name for name, _ in model.named_parameters()} - {"logit_scale"}]
    assert [len(batches) for batches in watch.batches] == [STEPS]
    assert not stage_folder(tmp_path / "out").exists()


def test_direct_fine_tuning_of_what_a_stage_trains(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    model = made(tmp_path / "out", base, method="direct", direct_parameters="ffn")
    assert watch.changed == [set(vision_moe.ffn_state_dict(model))]


def test_sparse_upcycling_trains_copies_and_routers_together(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    model = made(tmp_path / "out", base, method="sparse")
    start = vision_moe.ffn_state_dict(vision_moe.load(base))
    for name, layer in vision_moe.moe_layers(model).items():
        key = "c_fc.weight"
        copies = [watch.starts[0][f"{name}.experts.{j}.{key}"] for j in range(3)]
        assert all(torch.equal(one, start[f"{name}.{key}"]) for one in copies)
        now = [layer.get_parameter(f"experts.{j}.{key}") for j in range(3)]
        assert not torch.equal(now[0], now[1])
        assert f"{name}.router.weight" in watch.changed[0]
    assert [len(batches) for batches in watch.batches] == [STEPS]


def test_seed_only_stages_differ_in_their_batches_alone(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    model = made(tmp_path / "out", base, method="seeds")
    start = dict(vision_moe.load(base).named_parameters())
    for before in watch.starts[:2]:
        assert all(torch.equal(before[name], p) for name, p in start.items())
    assert not np.array_equal(watch.batches[0][0], watch.batches[1][0])
    assert not (stage_folder(tmp_path / "out") / "stage_1" / "labels.safetensors").exists()
    assert len(vision_moe.moe_layers(model)) == 4


def test_shuffled_labels_keep_the_sizes_of_the_clusters() -> None:
    labels = np.array([[0, 1], [0, 1], [2, 0], [-1, -1], [1, 1]], np.int8)
    exchanged = dmu._exchanged(np.repeat(labels, 20, axis=0), seed=1)
    assert not np.array_equal(exchanged, np.repeat(labels, 20, axis=0))
    counts = np.unique(exchanged, axis=0, return_counts=True)
    expected = np.unique(np.repeat(labels, 20, axis=0), axis=0, return_counts=True)
    for one, two in zip(counts, expected, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(exchanged[60:80], np.full((20, 2), -1))


def test_shuffled_labels_give_other_batches_from_the_same_clusters(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    made(tmp_path / "dmu", base, num_experts=2)
    made(tmp_path / "control", base, num_experts=2, method="shuffled_labels")
    kept = [
        load_file(stage_folder(tmp_path / name) / "stage_1" / "labels.safetensors")["labels"]
        for name in ("dmu", "control")
    ]
    assert torch.equal(*kept)
    assert not np.array_equal(watch.batches[0], watch.batches[2])


# --- attention beside the networks ----------------------------------------------------------------


def attention_of(model: CLIPMoEModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".attn." in name}


def test_attention_trains_in_the_stages_alone(base: Path, tmp_path: Path, watch: Watch) -> None:
    made(tmp_path / "out", base, attention_lr=1e-3)
    dense = vision_moe.load(base)
    trained = {*vision_moe.ffn_state_dict(dense), *attention_of(dense)}
    assert watch.changed[:2] == [trained, trained]
    assert {name.rsplit(".", 2)[1] for name in watch.changed[2]} == {"router"}


@pytest.mark.parametrize("experts", ["full", "low_rank"])
def test_a_stage_goes_on_from_the_attention_of_the_one_before(
    base: Path, tmp_path: Path, watch: Watch, experts: str
) -> None:
    model = made(tmp_path / "out", base, attention_lr=1e-3, experts=experts, rank=4)
    first, last = (
        load_file(stage_folder(tmp_path / "out") / f"stage_{number}" / "attention.safetensors")
        for number in (1, 2)
    )
    assert all(watch.starts[1][name].equal(value) for name, value in first.items())
    assert all(last[name].equal(value) for name, value in attention_of(model).items())
    assert not any(last[name].equal(value) for name, value in first.items())


@pytest.mark.parametrize(
    "method", [{"method": "direct", "direct_parameters": "ffn"}, {"method": "sparse"}]
)
def test_attention_trains_in_baselines_too(
    base: Path, tmp_path: Path, watch: Watch, method: dict[str, Any]
) -> None:
    model = made(tmp_path / "out", base, attention_lr=1e-3, **method)
    others = set(attention_of(model))
    assert {name for name in watch.changed[0] if ".mlp." not in name} == others


@pytest.mark.parametrize("parameters", ["all", "ffn"])
def test_attention_has_its_own_rate(base: Path, tmp_path: Path, parameters: str) -> None:
    tuned = made(
        tmp_path / "out", base, method="direct", direct_parameters=parameters, attention_lr=1e-30
    )
    start = vision_moe.load(base)
    for name, value in tuned.named_parameters():
        change = (value - start.get_parameter(name)).abs().max()
        if ".attn." in name:
            assert change < 1e-25
        elif ".mlp." in name:
            assert change > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "seeds"},
        {"stage_init": "base"},
        {"clusters": "parallel", "cluster_modality": "text"},
    ],
)
def test_stages_of_different_attention_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="'attention_lr' needs stages that go on from one another"):
        run_recipe(recipe_of(tmp_path / "out", base, attention_lr=1e-3, **changes))


def test_blocks_without_attention_are_refused(tmp_path: Path) -> None:
    from tests.train.test_dry_run import MODEL, recipe_with

    recipe = recipe_with("attention_lr=1e-3", "text_blocks=none")
    recipe.model = MODEL | {
        "vision_cfg": {
            "timm_model_name": "mixer_s32_224", "timm_pool": "", "timm_proj": "linear",
            "image_size": 224,
        }
    }  # fmt: skip
    with pytest.raises(InputError, match="'attention_lr': .* have no attention"):
        describe_upcycling(recipe)


def test_runs_from_before_attention_could_train_go_on(base: Path, tmp_path: Path) -> None:
    frozen, trained = (
        configuration(recipe_of(tmp_path / "out", base, attention_lr=rate)) for rate in (None, 1e-3)
    )
    assert "attention_lr" not in frozen
    assert trained == frozen | {"attention_lr": 1e-3}


# --- clusters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modality", "seed"), [("image", 1), ("text", 0)])
def test_clusters_of_one_modality(modality: Any, seed: int) -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 60, 8)).astype(np.float32)
    labels = vision_moe.stage_labels(image, text, 3, 0, modality)
    own = image if modality == "image" else text
    np.testing.assert_array_equal(labels, vision_moe.clustering.cluster_features(own, 3, seed))


def test_parallel_clusters_give_an_expert_each(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    made(tmp_path / "out", base, clusters="parallel", cluster_modality="image")
    labels = [
        load_file(stage_folder(tmp_path / "out") / f"stage_{n}" / "labels.safetensors")["labels"]
        for n in (1, 2)
    ]
    assert torch.equal(*labels)
    for number in (0, 1):
        seen = np.concatenate(watch.batches[number])
        assert set(labels[0][seen, 0].tolist()) == {number}
    start = dict(vision_moe.load(base).named_parameters())
    assert all(torch.equal(watch.starts[1][name], p) for name, p in start.items())


def test_cluster_smaller_than_a_batch_is_filled_up(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    stage = STAGE | {"steps": 2, "batch_size": 40}
    made(tmp_path / "out", base, clusters="parallel", cluster_modality="image", stage=stage)
    own = load_file(stage_folder(tmp_path / "out") / "stage_1" / "labels.safetensors")["labels"]
    for number in (0, 1):
        cluster = set((own[:, 0] == number).nonzero().flatten().tolist())
        assert len(cluster) < 40
        for batch in watch.batches[number]:
            assert len(set(batch.tolist())) == 40 and cluster < set(batch.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": "parallel"}, "needs 'cluster_modality: image' or 'text'"),
        (
            {"clusters": "parallel", "cluster_modality": "text", "num_clusters": 5},
            "'num_clusters' is 5, 'num_experts' 3",
        ),
        ({"method": "sparse", "experts": "low_rank"}, "its 'experts' must be 'full'"),
        ({"method": "sparse", "experts": "truncated"}, "its 'experts' must be 'full'"),
        ({"router": STAGE | {"base_gate": True}, "expert_spread": 0.5}, "needs the base among"),
    ],
)
def test_options_that_do_not_go_together(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_recipe(recipe_of(tmp_path / "out", base, **changes))


# --- low-rank experts -----------------------------------------------------------------------------


def test_low_rank_stages_train_changes_that_share_the_base(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    model = made(tmp_path / "out", base, experts="low_rank", rank=4)
    dense = vision_moe.ffn_state_dict(vision_moe.load(base))
    stages = [expert(tmp_path / "out", number) for number in (1, 2)]
    assert {name.rsplit(".", 1)[1] for name in stages[0]} == {"a", "b", "bias"}
    assert all(".deltas." in name for name in watch.changed[0] | watch.changed[1])
    for name, layer in vision_moe.moe_layers(model).items():
        assert isinstance(layer.experts, LowRankExperts) and layer.experts.rank == 4
        assert torch.equal(layer.experts.base.c_fc.weight, dense[f"{name}.c_fc.weight"])
        for index, stage in enumerate(stages):
            for factor in ("a", "b"):
                stored = layer.experts.deltas["c_fc"].get_parameter(factor)[index]
                assert torch.equal(stored, stage[f"{name}.c_fc.{factor}"])
    # The second stage goes on from the first one's changes.
    first = {n.replace(".deltas.", "."): v for n, v in watch.starts[1].items() if ".deltas." in n}
    assert all(torch.equal(value, stages[0][name]) for name, value in first.items())


def test_truncated_experts_are_changes_of_the_mean_and_their_router_trains(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    model = made(tmp_path / "out", base, experts="truncated", rank=4)
    dense = vision_moe.ffn_state_dict(vision_moe.load(base))
    stages = [expert(tmp_path / "out", number) for number in (1, 2)]
    for name, layer in vision_moe.moe_layers(model).items():
        assert isinstance(layer.experts, LowRankExperts) and layer.experts.rank == 4
        weight = f"{name}.c_fc.weight"
        mean = (dense[weight] + stages[0][weight] + stages[1][weight]) / 3
        torch.testing.assert_close(layer.experts.base.c_fc.weight, mean)
    assert not any(".deltas." in name for name in watch.changed[0])  # a stage trains whole networks
    assert {name.rpartition(".")[0] for name in watch.changed[2]} == {
        f"{name}.router" for name in vision_moe.moe_layers(model)
    }


def test_forced_low_rank_expert_equals_its_stage(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "out", base, experts="low_rank", rank=4)
    model = vision_moe.load(run_recipe(recipe))
    stage = dmu._model_of(recipe, dmu.mcl_stages(recipe)[1], vision_moe.load(base))
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), vision_moe.force_expert(model, 2):
        # Worst error measured: 0.
        torch.testing.assert_close(
            model.encode_image(pictures), stage.encode_image(pictures), atol=1e-5, rtol=0
        )


# --- which blocks, and the plan -------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 0.5])
def test_only_chosen_blocks_become_mixtures(
    base: Path, tmp_path: Path, watch: Watch, spread: float
) -> None:
    blocks = {"vision_blocks": "last_1", "text_blocks": "none"}
    model = made(tmp_path / "out", base, **blocks, expert_spread=spread)
    name = "visual.transformer.resblocks.1.mlp"
    assert list(vision_moe.moe_layers(model)) == [name]
    assert all(changed.startswith(name) for changed in watch.changed[0])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "dmu: 2 stages of 3 steps, then 3 of the routers"),
        ({"method": "sparse"}, "sparse: copies of the base and their routers train for 9 steps"),
        ({"method": "direct"}, "direct: all parameters of the dense CLIP train for 9 steps"),
        ({"experts": "low_rank", "rank": 4}, "3 experts, top-2, rank 4"),
        ({"experts": "truncated", "rank": 4}, "3 experts, top-2, rank 4"),
        (
            {"router": {"steps": 3, "lr": 1e-2, "experts_lr": 1e-3}},
            "dmu: 2 stages of 3 steps, then 3 of the routers and the experts, these at 0.001",
        ),
        ({"attention_lr": 5e-4}, "the attention beside the networks trains, too, at 0.0005"),
    ],
)
def test_dry_run_tells_the_plan(
    base: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    assert line in describe_upcycling(recipe_of(tmp_path / "out", base, **changes))


def test_low_rank_parameters_are_counted() -> None:
    from tests.train.test_dry_run import MODEL, recipe_with

    recipe = recipe_with("experts=low_rank", "rank=4", "text_blocks=none")
    moe = moe_config(recipe, start_model(MODEL, None, 0))
    assert moe["vision_ranks"] == [4] * 6 and moe["text_ranks"] == []
    recipe.model = MODEL
    # Six blocks of width 32, hidden 128: factors of both layers, and their biases.
    assert trained_parameters(recipe) == 6 * (2 * 4 * (32 + 128) + 128 + 32)


def test_whole_networks_train_for_truncated_experts() -> None:
    from tests.train.test_dry_run import MODEL, recipe_with

    recipe = recipe_with("experts=truncated", "rank=4", "text_blocks=none")
    recipe.model = MODEL
    assert trained_parameters(recipe) == 6 * (2 * 32 * 128 + 128 + 32)


def test_attention_that_trains_is_counted() -> None:
    from tests.train.test_dry_run import MODEL, recipe_with

    recipe = recipe_with("attention_lr=1e-3", "vision_blocks=last_2", "text_blocks=none")
    recipe.model = MODEL
    # Four projections of width 32 in each of two blocks, beside the networks.
    assert trained_parameters(recipe) == 2 * (2 * 32 * 128 + 128 + 32) + 2 * (4 * 32 * 33)


def trained_parameters(recipe: UpcycleRecipe) -> int:
    """Of the image tower, as the plan has it."""
    trained = describe_upcycling(recipe).splitlines()[-3].split()[-1]
    return int(trained.replace(",", ""))


# --- long captions, and losses that are no numbers ------------------------------------------------


def test_text_context_is_stretched(base: Path, tmp_path: Path) -> None:
    model = made(tmp_path / "out", base, num_experts=2, text_context=80)
    assert model.tokenizer(["a"]).shape == (1, 80)
    start = vision_moe.load(base).text.positional_embedding
    assert torch.equal(model.text.positional_embedding[:20], start[:20])


def test_loss_that_is_no_number_names_the_batch_and_keeps_the_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        loss = contrastive_loss(*arguments, **options)
        return loss * float("nan") if len(calls) == 3 else loss

    monkeypatch.setattr("train.contrastive.contrastive_loss", broken)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"step 3 \(pairs \d+, .*checkpoint-2 is from before"):
        run_recipe(recipe_of(out, base, method="direct", save_steps=1))
    assert not out.exists()
    monkeypatch.undo()
    assert run_recipe(recipe_of(out, base, method="direct", save_steps=1)) == out
