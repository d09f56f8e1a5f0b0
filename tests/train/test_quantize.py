"""QLoRA on the processor: a language model in four bits, its adapters, and the way back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from mllm.model import load_mllm
from train import run_recipe
from train.parts import set_trainable
from train.quantize import quantize_nf4
from train.recipe import (
    InstructionRecipe,
    LLMTraining,
    Trainable,
)
from train.starting_model import load_model, set_parts
from vision_moe import InputError


@pytest.fixture
def recipe(recipe: InstructionRecipe) -> InstructionRecipe:
    recipe.llm_quantization, recipe.steps = "nf4", 20
    return recipe


def test_only_linear_layers_of_the_language_model_are_quantized(recipe: InstructionRecipe) -> None:
    model, _ = load_model(recipe)
    quantized = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    packed = {name for name, p in model.named_parameters() if not p.is_floating_point()}
    assert packed == {f"{name}.weight" for name in quantized}


def test_quantized_weights_count_as_what_they_stand_for(recipe: InstructionRecipe) -> None:
    plain = dataclasses.replace(recipe, llm_quantization="none")
    counts = [set_parts(one, load_model(one)[0]).num_parameters for one in (plain, recipe)]
    assert counts[0] == counts[1]


def test_trained_adapters_merge_into_what_the_quantized_model_computes(mllm: Any) -> None:
    model, _ = mllm
    quantize_nf4(model.model.language_model, torch.device("cpu"))
    parts = set_trainable(model, Trainable(llm=LLMTraining(mode="lora", r=4)))
    with torch.no_grad():
        for parameter in parts.parameters["llm"]:
            parameter.normal_(std=0.1)
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids).logits
    parts.merge()
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    # Measured worst: 6.5e-6 of logits up to 6.
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_qlora_learns_and_leaves_a_plain_folder(recipe: InstructionRecipe) -> None:
    folder = run_recipe(recipe)
    history = json.loads((folder / "training_log.json").read_text())["history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    model, _ = load_mllm(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_language_model_that_is_only_read_leaves_as_it_came(
    recipe: InstructionRecipe, llm_folder: Path
) -> None:
    recipe.trainable.llm.mode, recipe.steps = "frozen", 2
    model, _ = load_mllm(run_recipe(recipe))
    original, _ = load_model(dataclasses.replace(recipe, llm_quantization="none"))
    before = original.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("multi_modal_projector" in name), name


def test_training_four_bits_in_full_is_refused(recipe: InstructionRecipe) -> None:
    recipe.trainable.llm.mode = "full"
    with pytest.raises(InputError, match="four bits"):
        run_recipe(recipe)


def test_frozen_weights_in_bf16_and_trained_ones_in_fp32(recipe: InstructionRecipe) -> None:
    recipe.llm_quantization, recipe.frozen_precision = "none", "bf16"
    model, _ = load_model(recipe)
    set_parts(recipe, model)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    recipe.steps = 2
    run_recipe(recipe)  # without autocast


def test_no_weight_is_left_in_the_file_it_was_read_from(
    recipe: InstructionRecipe, mllm_folder: Path
) -> None:
    """Else all of the file, with what is in four bits now, counts as this process's memory."""
    recipe.init_from, recipe.tower = str(mllm_folder), None
    model, _ = load_model(recipe)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("not Linux")
    assert str(mllm_folder) not in maps.read_text()
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
