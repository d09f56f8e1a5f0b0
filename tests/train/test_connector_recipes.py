"""Recipes with another connector than LLaVA's."""

from pathlib import Path
from typing import Any

import pytest

from mllm.model import load_mllm
from train import run_recipe
from train.recipe import InstructionRecipe, Trainable
from vision_moe import InputError, moe_layers


@pytest.fixture
def recipe(recipe: InstructionRecipe) -> InstructionRecipe:
    recipe.trainable, recipe.steps = Trainable(), 2
    return recipe


@pytest.mark.parametrize("connector", ["pixel_shuffle", "resampler"])
def test_connector_of_the_recipe_is_trained_and_saved(
    recipe: InstructionRecipe, connector: str
) -> None:
    recipe.connector = {"name": connector}
    model, _ = load_mllm(run_recipe(recipe))
    assert model.config.connector == {"name": connector}


def test_trained_mlp_is_upcycled(recipe: InstructionRecipe, tmp_path: Path) -> None:
    recipe.init_from, recipe.out = str(run_recipe(recipe)), str(tmp_path / "experts")
    recipe.tower = None
    recipe.connector = {"name": "moe_mlp", "num_experts": 3}
    model: Any
    model, _ = load_mllm(run_recipe(recipe))
    (layer,) = moe_layers(model.model.multi_modal_projector).values()
    assert layer.num_experts == 3
    first, second = (layer.experts[number].linear_1.weight for number in (0, 1))
    assert not first.equal(second)  # they were copies, and have seen other tokens


def test_start_by_words_is_for_the_mlp(recipe: InstructionRecipe) -> None:
    recipe.connector, recipe.connector_start = {"name": "linear"}, "words"
    with pytest.raises(InputError, match="mlp2x_gelu alone"):
        run_recipe(recipe)


def test_connector_that_does_not_fit_is_told(recipe: InstructionRecipe) -> None:
    recipe.connector = {"name": "pixel_shuffle", "factor": 3}
    with pytest.raises(InputError, match="16 tokens are no square"):
        run_recipe(recipe)
