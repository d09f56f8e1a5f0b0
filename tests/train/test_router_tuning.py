"""What of a CLIP-MoE is tuned after the stages, on which batches: the routers, and on demand the
experts and the attention with them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vision_moe
from tests.train.test_dmu import Watch, recipe_of, stage_folder
from tests.train.test_upcycle_options import attention_of, made
from train import run_recipe
from train.contrastive import ContrastiveModel, configuration
from train.experts import attention_rates, rates_beside_routers
from train.recipe import RouterTraining


@pytest.fixture(scope="module")
def upcycled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(recipe_of(tmp_path_factory.mktemp("upcycled") / "moe", base))


ROUTER = {"steps": 3, "batch_size": 8, "lr": 1e-2, "warmup_steps": 1, "logit_scale": 100}


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"z": 0.1}, {"router"}),
        ({"bias_rate": 0.1, "balance": 0}, {"router", "expert_bias"}),
        ({"base_gate": True}, {"router", "base_gate"}),
        ({"kind": "training_free"}, set()),
        ({"kind": "training_free", "base_gate": True}, {"base_gate"}),
        ({"kind": "uniform"}, set()),
        ({"kind": "random"}, set()),
    ],
)
def test_what_of_the_router_trains(
    upcycled: Path, base: Path, tmp_path: Path, watch: Watch, options: Any, trained: set[str]
) -> None:
    shutil.copytree(stage_folder(upcycled), tmp_path / "out.stages")
    model = made(tmp_path / "out", base, router=ROUTER | options)
    changed = watch.changed[0] if watch.changed else set()
    assert {name.split(".mlp.")[1].split(".")[0] for name in changed} == trained
    assert bool(watch.changed) == bool(trained)
    assert len(vision_moe.moe_layers(model)) == 4


def test_routers_see_clusters_where_the_recipe_says_so(
    upcycled: Path, base: Path, tmp_path: Path, watch: Watch
) -> None:
    shutil.copytree(stage_folder(upcycled), tmp_path / "out.stages")
    made(tmp_path / "out", base, router=ROUTER | {"global_share": 0.0, "steps": 6})
    labels = load_file(stage_folder(upcycled) / "stage_1" / "labels.safetensors")["labels"]
    sizes = labels.unique(return_counts=True)[1]
    clusters = [labels[torch.from_numpy(batch)].unique() for batch in watch.batches[0]]
    # An epoch is 6 batches; what does not fill one is pooled with other clusters'.
    assert sum(len(one) == 1 for one in clusters) == sum(sizes // 8) > 0


@pytest.mark.parametrize("experts", ["full", "low_rank", "truncated"])
def test_experts_train_with_the_routers(
    base: Path, tmp_path: Path, watch: Watch, experts: str
) -> None:
    options = {"router": ROUTER | {"experts_lr": 1e-3}, "experts": experts, "rank": 4}
    model = made(tmp_path / "out", base, **options)
    # Low-rank experts' base is what they share, and stays.
    part = ".experts." if experts == "full" else ".experts.deltas."
    trained = {name for name, _ in model.named_parameters() if part in name}
    routers = {f"{name}.router.weight" for name in vision_moe.moe_layers(model)}
    assert watch.changed[2] == trained | routers
    assert [len(batches) for batches in watch.batches] == [3, 3, 3]


def test_attention_trains_with_the_experts(base: Path, tmp_path: Path, watch: Watch) -> None:
    model = made(
        tmp_path / "out", base, attention_lr=1e-3, router=ROUTER | {"experts_lr": 1e-3}
    )
    others = {name for name in watch.changed[2] if ".mlp." not in name}
    assert others == set(attention_of(model))


@pytest.mark.parametrize("method", ["dmu", "sparse"])
def test_rates_beside_the_routers(base: Path, tmp_path: Path, method: str) -> None:
    router = ROUTER | {"experts_lr": 3e-4}
    recipe = recipe_of(tmp_path / "out", base, method=method, attention_lr=5e-4, router=router)
    dense = vision_moe.load(base)
    attention = attention_rates(recipe, dense)
    layers = vision_moe.moe_layers(vision_moe.load(run_recipe(recipe)))
    rates = rates_beside_routers(recipe, layers, attention)
    # Sparse upcycling's one run has the stages' rates.
    expected = recipe.stage.lr if method == "sparse" else 3e-4
    share = 5e-4 / recipe.stage.lr
    assert rates.keys() > attention.keys()
    for name, rate in rates.items():
        assert rate == pytest.approx(expected * (share if name in attention else 1))


def test_experts_have_their_own_rate_beside_the_routers(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    made(tmp_path / "out", base, router=ROUTER | {"experts_lr": 1e-30})
    assert {name.rsplit(".", 2)[1] for name in watch.changed[2]} == {"router"}


def test_runs_from_before_experts_could_train_with_routers_go_on(
    base: Path, tmp_path: Path
) -> None:
    frozen, trained = (
        configuration(recipe_of(tmp_path / "out", base, router=ROUTER | {"experts_lr": rate}))
        for rate in (None, 1e-3)
    )
    assert "experts_lr" not in frozen["router"]
    assert trained == frozen | {"router": frozen["router"] | {"experts_lr": 1e-3}}


def test_routers_of_shuffled_labels_see_other_clusters(
    base: Path, tmp_path: Path, watch: Watch
) -> None:
    router = ROUTER | {"global_share": 0.0, "steps": 6}
    made(tmp_path / "out", base, method="shuffled_labels", router=router)
    file = stage_folder(tmp_path / "out") / "stage_1" / "labels.safetensors"
    labels = load_file(file)["labels"]
    assert all(len(labels[torch.from_numpy(batch)].unique()) > 1 for batch in watch.batches[2])


def test_z_loss_is_added_with_its_weight(upcycled: Path) -> None:
    model = vision_moe.load(upcycled)
    pictures = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenizer(["a", "b c", "d", "e f g"])
    settings = {"steps": 1, "lr": 1.0, "logit_scale": 100.0, "balance": 0.0}
    with torch.no_grad():
        logits = model(pictures, tokens).router_logits
        losses = [
            ContrastiveModel(model, RouterTraining(**settings, z=z))(pictures, tokens)["loss"]
            for z in (0.0, 0.5)
        ]
        z_loss = torch.stack([one.logsumexp(-1).square().mean() for one in logits]).mean()
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * z_loss)
