"""Contrastive training of a tiny CLIP: what trains, what is written, what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

import vision_moe
from train import contrastive, engine, run_recipe
from train.config import load_recipe, parse_recipe
from train.contrastive import ContrastiveModel, start_model
from train.pair_batches import PairBatches, random_batches
from train.pair_sources import fingerprints
from train.pairs import load_pairs
from train.recipe import ContrastiveRecipe, ContrastiveTraining, RouterTraining
from vision_moe import CLIPMoEModel, InputError, contrastive_loss, load_balancing_loss
from vision_moe.towers import vision_states

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {
        "context_length": 64, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
    },
}  # fmt: skip


def recipe_of(out: Path, **changes: Any) -> ContrastiveRecipe:
    content = {
        "kind": "contrastive",
        "out": str(out),
        "model": MODEL,
        "data": {"num_pairs": 24},
        "training": {
            "steps": 4, "batch_size": 8, "lr": 1e-3, "warmup_steps": 1, "earlier_pairs": 12,
        },
        "precision": "fp32",
        **changes,
    }  # fmt: skip
    recipe = parse_recipe(content, "test")
    assert isinstance(recipe, ContrastiveRecipe)
    return recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(recipe_of(tmp_path_factory.mktemp("contrastive") / "clip"))


def log_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "training_log.json").read_text())
    return content


def test_result_loads_as_a_dense_clip(trained: Path) -> None:
    assert vision_moe.load(trained).config.moe is None


def test_all_parameters_train(trained: Path) -> None:
    start = dict(start_model(MODEL, None, seed=0).named_parameters())
    rest = {
        name for name, p in vision_moe.load(trained).named_parameters() if p.equal(start[name])
    }
    assert not rest


def test_result_goes_on_evaluating(trained: Path) -> None:
    assert not vision_moe.load(trained).training


def test_log_has_every_step(trained: Path) -> None:
    history = log_of(trained)["history"]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    assert all(math.isfinite(entry["loss"]) for entry in history)


def test_first_loss_is_that_of_the_start_on_the_first_batch(trained: Path) -> None:
    recipe = recipe_of(trained)
    start = start_model(MODEL, None, recipe.seed)
    pairs = load_pairs(recipe.data, start, recipe.seed)
    batch = PairBatches(pairs, random_batches(24, 8, 1, recipe.seed), start)[0]
    loss = loss_of(start, recipe.training, batch).detach()
    assert log_of(trained)["history"][0]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_resolved_recipe_is_written_and_gives_the_same(trained: Path) -> None:
    assert load_recipe(trained / "recipe.yaml") == recipe_of(trained)


def test_same_seed_gives_the_same_bits(trained: Path, tmp_path: Path) -> None:
    again = run_recipe(recipe_of(tmp_path / "again"))
    assert_equal(trained, again)


def assert_equal(one: Path, two: Path) -> None:
    second = vision_moe.load(two).state_dict()
    for name, tensor in vision_moe.load(one).state_dict().items():
        assert torch.equal(tensor, second[name]), name


def test_another_seed_gives_another_model(trained: Path, tmp_path: Path) -> None:
    other = vision_moe.load(run_recipe(recipe_of(tmp_path / "other", seed=1)))
    weight = vision_moe.load(trained).visual.conv1.weight
    assert not torch.equal(other.visual.conv1.weight, weight)


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(contrastive, "fit", forbidden)


def test_whole_run_is_not_run_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    assert run_recipe(recipe_of(trained)) == trained


def test_another_configuration_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    with pytest.raises(InputError, match="'seed' is 0 there and 1 now"):
        run_recipe(recipe_of(trained, seed=1))


def test_changed_pairs_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    data = {"name": "jsonl", "path": str(path)}
    path.write_text("{}")
    before = fingerprints(recipe_of(tmp_path, data=data).data)
    path.write_text("{ }")
    assert fingerprints(recipe_of(tmp_path, data=data).data) != before


def test_broken_run_goes_on_to_the_same_bits(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path / "broken", save_steps=2)
    original = engine.ProgressBar.on_step_end

    def kill(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.ProgressBar, "on_step_end", kill)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe)
    assert_equal(run_recipe(recipe), trained)


def test_training_goes_on_from_a_folder(trained: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "next", model=str(trained))
    recipe.training.lr = 1e-12
    weight = vision_moe.load(run_recipe(recipe)).visual.conv1.weight
    torch.testing.assert_close(weight, vision_moe.load(trained).visual.conv1.weight)


def test_loss_that_is_no_number_is_one_sentence(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "hot")
    recipe.training.lr = 1e30
    with pytest.raises(InputError, match=r"step 2 \(pairs [0-9, ]+\): the loss is nan"):
        run_recipe(recipe)
    assert not (tmp_path / "hot").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"embed_dim": "wide"},
        {"vision_cfg": 5},
        {"vision_cfg": {**MODEL["vision_cfg"], "patch_size": 0}},  # type: ignore[dict-item]
        {"vision_cfg": {**MODEL["vision_cfg"], "depth": 3}},  # type: ignore[dict-item]
    ],
)
def test_impossible_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="'model': no CLIP can be built"):
        run_recipe(recipe_of(tmp_path / "out", model={**MODEL, **change}))


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ViT-B-33"):
        run_recipe(recipe_of(tmp_path / "out", model="ViT-B-33"))


def test_unknown_pretrained_tag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'pretrained' of ViT-B-32.*nobody"):
        run_recipe(recipe_of(tmp_path / "out", model="ViT-B-32", pretrained="nobody"))


# --- the loss of a batch -------------------------------------------------------------------------


@pytest.fixture
def batch(clip: CLIPMoEModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
        "input_ids": clip.tokenizer(["a red star", "a blue cross", "a ring"]),
    }


def plain_loss(clip: CLIPMoEModel, batch: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    output = clip(**batch)
    return contrastive_loss(output.image_features, output.text_features, scale)


def loss_of(clip: CLIPMoEModel, training: ContrastiveTraining, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = ContrastiveModel(clip, training)(**batch)["loss"]
    return loss


def test_temperature_is_the_recipes(clip: CLIPMoEModel, batch: dict[str, torch.Tensor]) -> None:
    training = ContrastiveTraining(steps=1, lr=1.0, logit_scale=30.0)
    torch.testing.assert_close(loss_of(clip, training, batch), plain_loss(clip, batch, 30.0))


def test_temperature_is_the_models_own_otherwise(
    clip: CLIPMoEModel, batch: dict[str, torch.Tensor]
) -> None:
    expected = plain_loss(clip, batch, 1 / 0.07)
    training = ContrastiveTraining(steps=1, lr=1.0)
    torch.testing.assert_close(loss_of(clip, training, batch), expected)


def test_trained_temperature_is_clamped(
    clip: CLIPMoEModel, batch: dict[str, torch.Tensor]
) -> None:
    clip.logit_scale.data.fill_(50.0)
    training = ContrastiveTraining(steps=1, lr=1.0)
    torch.testing.assert_close(loss_of(clip, training, batch), plain_loss(clip, batch, 100.0))


def test_routers_train_with_the_balance_loss(
    clip: CLIPMoEModel, batch: dict[str, torch.Tensor]
) -> None:
    training = RouterTraining(steps=1, lr=1.0, logit_scale=30.0, balance=0.5)
    expected = plain_loss(clip, batch, 30.0) + 0.5 * load_balancing_loss(
        clip(**batch).router_logits
    )
    torch.testing.assert_close(loss_of(clip, training, batch), expected)


@pytest.mark.parametrize("layer", [-1, -2])
def test_patch_tokens_have_a_loss_of_their_own(
    clip: CLIPMoEModel, batch: dict[str, torch.Tensor], layer: int
) -> None:
    training = ContrastiveTraining(
        steps=1, lr=1.0, logit_scale=30.0, patch_loss=0.5, patch_layer=layer
    )
    tokens = vision_states(clip.visual, batch["pixel_values"]).hidden_states[layer][:, 1:]
    patches = (clip.visual.ln_post(tokens) @ clip.visual.proj).mean(dim=1)
    expected = plain_loss(clip, batch, 30.0) + 0.5 * contrastive_loss(
        patches, clip.encode_text(batch["input_ids"]), 30.0
    )
    torch.testing.assert_close(loss_of(clip, training, batch), expected)


def test_patch_loss_reaches_what_the_class_token_cannot(
    clip: CLIPMoEModel, batch: dict[str, torch.Tensor]
) -> None:
    states: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        states.append(output)

    clip.visual.transformer.resblocks[-1].register_forward_hook(keep)
    for weight in (0.0, 1.0):
        training = ContrastiveTraining(steps=1, lr=1.0, patch_loss=weight, patch_layer=-1)
        loss_of(clip, training, batch).backward()
    without, with_loss = (state.grad for state in states)
    assert without is not None and not without[:, 1:].any()
    assert with_loss is not None and with_loss[:, 1:].all(dim=-1).any()


@pytest.mark.parametrize(("again", "left"), [([6, 7, 8], [0, 1, 2, 3]), ([4, 7, 0], [0, 2])])
def test_pairs_of_earlier_batches_are_negatives_but_those_of_the_batch(
    clip: CLIPMoEModel, batch: dict[str, torch.Tensor], again: list[int], left: list[int]
) -> None:
    clip.eval()
    training = ContrastiveTraining(
        steps=3, lr=1.0, logit_scale=30.0, patch_loss=0.5, patch_layer=-1, earlier_pairs=4
    )
    model = ContrastiveModel(clip, training)
    backwards = {name: values.flip(0) for name, values in batch.items()}
    torch.testing.assert_close(
        model(**batch, numbers=torch.tensor([0, 1, 2]))["loss"],
        loss_of(clip, replace(training, earlier_pairs=0), batch),
    )
    model(**backwards, numbers=torch.tensor([3, 4, 5]))
    loss = model(**batch, numbers=torch.tensor(again))["loss"]

    def in_order(features: torch.Tensor) -> torch.Tensor:
        """The three of the batch before, then one of the first batch: pairs 3, 4, 5 and 0."""
        return normalize(torch.cat([features.flip(0), features[:1]]), dim=-1)[left]

    image, patches = clip.encode_image_and_patches(batch["pixel_values"], -1)
    text = clip.encode_text(batch["input_ids"])
    of_image, of_patches = (
        contrastive_loss(one, text, 30.0, earlier=(in_order(one), in_order(text)))
        for one in (image, patches)
    )
    torch.testing.assert_close(loss, of_image + 0.5 * of_patches)


def test_patch_loss_of_a_router_keeps_the_balance_loss(
    clip: CLIPMoEModel, batch: dict[str, torch.Tensor]
) -> None:
    plain = RouterTraining(steps=1, lr=1.0, balance=0.5, patch_loss=0.5)
    without = RouterTraining(steps=1, lr=1.0, balance=0.0, patch_loss=0.5)
    balance = load_balancing_loss(clip(**batch).router_logits)
    torch.testing.assert_close(
        loss_of(clip, plain, batch) - loss_of(clip, without, batch), 0.5 * balance
    )


@pytest.mark.parametrize("layer", [3, -4])
def test_layer_that_the_tower_lacks_is_refused(tmp_path: Path, layer: int) -> None:
    training = {"steps": 1, "lr": 1e-3, "patch_loss": 1.0, "patch_layer": layer}
    with pytest.raises(InputError, match=f"no layer {layer}: the tower has 2 blocks"):
        run_recipe(recipe_of(tmp_path / "clip", training=training))


def test_tower_without_patch_tokens_is_refused_a_patch_loss(tmp_path: Path) -> None:
    model = {**MODEL, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
    training = {"steps": 1, "lr": 1e-3, "patch_loss": 1.0}
    with pytest.raises(InputError, match="leave 'patch_loss' at 0"):
        run_recipe(recipe_of(tmp_path / "clip", model=model, training=training))
