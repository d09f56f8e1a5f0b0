"""Training runs of a tiny MLLM: what trains, what is written, what is resumed."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.train.test_checkpoints import run_killed_after
from train import run_recipe, stages
from train.config import load_recipe
from train.parts import set_trainable
from train.recipe import (
    ConnectorTraining,
    InstructionRecipe,
    LLMTraining,
    RouterPartTraining,
    TowerTraining,
    Trainable,
)
from vision_moe import CLIPMoEVisionModel, InputError


@pytest.fixture
def recipe(recipe: InstructionRecipe) -> InstructionRecipe:
    recipe.data[0].num_images, recipe.data[0].questions_per_image = 12, 3
    recipe.steps = 6
    return recipe


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def log(recipe: InstructionRecipe) -> dict[str, Any]:
    return json.loads((Path(recipe.out) / "training_log.json").read_text())


def history_of(recipe: InstructionRecipe) -> list[float]:
    return [entry["loss"] for entry in log(recipe)["history"]]


def test_result_is_a_stock_llava_folder(recipe: InstructionRecipe) -> None:
    folder = run_recipe(recipe)
    _, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert AutoProcessor.from_pretrained(folder).image_token == "<image>"


def test_loss_falls(recipe: InstructionRecipe) -> None:
    recipe.steps = 30
    run_recipe(recipe)
    history = history_of(recipe)
    assert len(history) == 30
    assert history[-1] < 0.6 * history[0]


def test_log_and_resolved_recipe_stand_beside_the_checkpoint(recipe: InstructionRecipe) -> None:
    folder = run_recipe(recipe)
    assert load_recipe(folder / "recipe.yaml") == recipe
    content = log(recipe)
    assert content["steps"] == 6
    assert content["num_parameters"]["vision"]["trained"] == 0


def test_frozen_llm_and_tower_stay_as_they_are(recipe: InstructionRecipe, tmp_path: Path) -> None:
    recipe.trainable.llm.mode = "frozen"
    first = weights(run_recipe(recipe))
    recipe.init_from, recipe.tower, recipe.out = recipe.out, None, str(tmp_path / "second")
    second = weights(run_recipe(recipe))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_products_in_8_bits_train_much_as_those_in_bf16(
    recipe: InstructionRecipe, tmp_path: Path, mode: Literal["frozen", "lora"]
) -> None:
    recipe.trainable.llm.mode, recipe.precision = mode, "bf16"
    halves, losses = weights(run_recipe(recipe)), history_of(recipe)
    recipe.out, recipe.int8_products = str(tmp_path / "int8"), True
    rounded, others = weights(run_recipe(recipe)), history_of(recipe)
    assert others != losses
    # Measured: within 1.5 %.
    assert others == pytest.approx(losses, rel=0.05)
    differ = {name for name in halves if not torch.equal(halves[name], rounded[name])}
    trained = "multi_modal_projector" if mode == "frozen" else ""
    assert differ and all(trained in name for name in differ)


def test_second_run_finds_the_result(
    recipe: InstructionRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(recipe)
    monkeypatch.setattr("train.instruction.load_model", None)
    run_recipe(recipe)


def test_folder_with_another_configuration_is_refused(recipe: InstructionRecipe) -> None:
    run_recipe(recipe)
    recipe.seed = 1
    with pytest.raises(InputError, match="'seed' is 0 there and 1 now"):
        run_recipe(recipe)


def test_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    recipe: InstructionRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its third epoch, of other halves of the data than the second."""
    recipe.trainable.llm.dropout = 0.1
    recipe.data[0].weight, recipe.group_by_modality = 0.5, True
    unbroken = weights(run_recipe(recipe))
    recipe.out, recipe.save_steps = str(tmp_path / "broken"), 2
    run_killed_after(recipe, 5, monkeypatch)
    assert not Path(recipe.out).exists()
    assert [p.name for p in Path(f"{recipe.out}.checkpoints").glob("checkpoint-*")] == [
        "checkpoint-4"
    ]
    resumed = weights(run_recipe(recipe))
    # Measured: bit for bit.
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)
    assert [entry["step"] for entry in log(recipe)["history"]] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_are_gone_when_the_run_is_done(recipe: InstructionRecipe) -> None:
    recipe.save_steps = 2
    run_recipe(recipe)
    assert not Path(f"{recipe.out}.checkpoints").exists()


def test_checkpoints_of_another_run_are_refused(
    recipe: InstructionRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.save_steps = 2
    run_killed_after(recipe, 3, monkeypatch)
    recipe.trainable.connector.lr = 2e-2
    with pytest.raises(InputError, match="another configuration"):
        run_recipe(recipe)


def test_resume_never_starts_again(
    recipe: InstructionRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.save_steps = 2
    run_killed_after(recipe, 3, monkeypatch)
    recipe.resume = "never"
    run_recipe(recipe)
    assert log(recipe)["history"][0]["step"] == 1


def test_merged_model_computes_what_the_adapted_one_did(mllm: Any) -> None:
    model, _ = mllm
    parts = set_trainable(model, Trainable(llm=LLMTraining(mode="lora", r=4)))
    with torch.no_grad():
        for parameter in parts.parameters["llm"]:
            parameter.normal_(std=0.1)
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids).logits
    parts.merge()
    # Measured worst: 2e-5 of logits up to 6.
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_lora_stays_out_of_tower_connector_and_head(mllm: Any) -> None:
    model, _ = mllm
    set_trainable(model, Trainable(llm=LLMTraining(mode="lora")))
    adapted = [name for name, _ in model.named_parameters() if "lora" in name]
    assert adapted and all(name.startswith("model.language_model.layers.") for name in adapted)


def test_full_mode_counts_tied_weights_once(mllm: Any) -> None:
    model, _ = mllm
    parts = set_trainable(model, Trainable(llm=LLMTraining(mode="full")))
    expected = sum(p.numel() for p in model.model.language_model.parameters())
    assert parts.num_parameters["llm"]["trained"] == expected


def test_nothing_to_train_is_refused(mllm: Any) -> None:
    with pytest.raises(InputError, match="trains nothing"):
        set_trainable(mllm[0], Trainable(connector=ConnectorTraining(mode="frozen")))


def test_unknown_lora_target_is_refused(mllm: Any) -> None:
    llm = LLMTraining(mode="lora", target=["q_porj"])
    with pytest.raises(InputError, match="q_porj"):
        set_trainable(mllm[0], Trainable(llm=llm))


def test_missing_tower_is_one_sentence(recipe: InstructionRecipe) -> None:
    recipe.tower = "absent"
    with pytest.raises(InputError, match="absent"):
        run_recipe(recipe)
    assert not Path(recipe.out).exists()


def test_recipe_without_tower_and_start_is_refused(recipe: InstructionRecipe) -> None:
    recipe.tower = None
    with pytest.raises(InputError, match="'tower'"):
        run_recipe(recipe)


def test_start_by_words_logs_what_it_explains(recipe: InstructionRecipe) -> None:
    recipe.steps = 1
    recipe.connector_start = "words"
    run_recipe(recipe)
    assert 0 < log(recipe)["connector_start_explained"] <= 1


def test_bf16_run_keeps_fp32_weights(recipe: InstructionRecipe) -> None:
    recipe.precision = "bf16"
    recipe.steps = 2
    assert {tensor.dtype for tensor in weights(run_recipe(recipe)).values()} == {torch.float32}


def test_accumulated_batches_weigh_by_their_tokens(
    recipe: InstructionRecipe, tmp_path: Path
) -> None:
    """Twelve rows as one batch, or as three: the same step."""
    recipe.steps, recipe.batch_rows = 1, 12
    whole = weights(run_recipe(recipe))
    recipe.batch_rows, recipe.gradient_accumulation = 4, 3
    recipe.out = str(tmp_path / "accumulated")
    parts = weights(run_recipe(recipe))
    # Measured worst: 6e-8.
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6)


def test_stdout_stays_empty(
    recipe: InstructionRecipe, capfd: pytest.CaptureFixture[str]
) -> None:
    run_recipe(recipe)
    assert capfd.readouterr().out == ""


def test_stage_says_what_it_took(recipe: InstructionRecipe) -> None:
    folder = run_recipe(recipe)
    record = json.loads((folder / stages.RECORD).read_text())
    assert record["seconds"] > 0


def test_tower_parts_train_at_their_own_rates(recipe: InstructionRecipe, clip_folder: Path) -> None:
    recipe.trainable = Trainable(
        vision=TowerTraining(mode="lora", lr=1e-2),
        router=RouterPartTraining(mode="full", lr=1e-2),
        experts=TowerTraining(mode="full", lr=1e-30),
    )
    recipe.steps = 2
    folder = run_recipe(recipe)
    tower = CLIPMoEVisionModel.from_pretrained(clip_folder).state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(folder).model.vision_tower.state_dict()
    changed = {name for name in tower if not torch.equal(tower[name], after[name])}
    assert any(".router." in name for name in changed)
    assert any(".attn." in name for name in changed)
    assert not any(".experts." in name for name in changed)
