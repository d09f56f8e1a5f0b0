"""Plans and estimates without weights: what they count is what a run then has."""

import json
from pathlib import Path

import pytest
import torch

from train import run_recipe
from train.config import load_recipe
from train.dry_run_instruction import dry_run
from train.estimate import estimate
from train.recipe import (
    InstructionRecipe,
    InstructionSource,
    RouterPartTraining,
    TowerTraining,
)
from vision_moe import InputError


@pytest.fixture
def recipe(recipe: InstructionRecipe) -> InstructionRecipe:
    recipe.trainable.router = RouterPartTraining(mode="full")
    recipe.trainable.experts = TowerTraining(mode="full")
    return recipe


def test_planned_parts_and_steps_are_those_of_the_run(recipe: InstructionRecipe) -> None:
    planned = estimate(recipe)
    log = json.loads((run_recipe(recipe) / "training_log.json").read_text())
    assert planned.num_parameters == log["num_parameters"]
    assert planned.steps == log["steps"]


def test_plan_is_of_the_tower_at_the_size_that_the_recipe_asks_for(
    recipe: InstructionRecipe,
) -> None:
    recipe.image_size = 96
    planned, lines = estimate(recipe), list(dry_run(recipe))
    log = json.loads((run_recipe(recipe) / "training_log.json").read_text())
    assert "picture 96 px -> 144 tokens" in lines[0]
    assert any(f"{log['num_tokens']:,} tokens" in line for line in lines)
    assert planned.num_parameters == log["num_parameters"]


def test_gradients_and_optimizer_are_those_of_what_trains(recipe: InstructionRecipe) -> None:
    planned = estimate(recipe)
    trained = sum(count["trained"] for count in planned.num_parameters.values())
    assert planned.gradients == 4 * trained
    num_tensors = planned.optimizer - 8 * trained  # AdamW: two moments, and a counter for each
    assert 0 < num_tensors < 4 * 200


def test_threads_change_nothing_of_an_estimate(recipe: InstructionRecipe) -> None:
    recipe.precision = "bf16"  # in which rows are spread over threads
    alone = estimate(recipe)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = estimate(recipe)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (together.activations, together.flops) == (alone.activations, alone.flops)
    assert alone.flops > 0


def test_dry_run_tells_shapes_records_parts_and_memory(recipe: InstructionRecipe) -> None:
    text = "\n".join(dry_run(recipe))
    assert "16 tokens of width 32 -> connector -> 32" in text
    assert "record 0:" in text
    assert "router" in text and "frozen" in text and "full, lr 0.0001" in text
    assert "peak memory" in text
    assert not Path(recipe.out).exists()


def test_dry_run_without_its_data_names_it(recipe: InstructionRecipe) -> None:
    recipe.data = [InstructionSource(name="llava_json", path="absent/mix.json")]
    with pytest.raises(InputError, match=r"absent/mix\.json"):
        list(dry_run(recipe))
    assert any("absent/mix.json" in note for note in estimate(recipe).notes)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        # LLaVA-1.5's connector: 1024 x 4096 + 4096 x 4096 and two biases.
        ("llava15_moe_pretrain", {"connector": 1024 * 4096 + 4096 * 4096 + 2 * 4096}),
        ("smollm2_135m_pretrain", {"connector": 1024 * 576 + 576 * 576 + 2 * 576}),
    ],
)
def test_published_recipe_is_planned_without_the_hub(name: str, trained: dict[str, int]) -> None:
    planned = estimate(load_recipe(name, ["batch_rows=1", "global_batch=256"]))
    counts = {part: count["trained"] for part, count in planned.num_parameters.items()}
    assert {part: count for part, count in counts.items() if count} == trained
    assert any("published" in note for note in planned.notes)


def test_unknown_start_is_one_sentence(recipe: InstructionRecipe) -> None:
    recipe.init_from = "runs/absent"
    with pytest.raises(InputError, match="no recipe that makes it"):
        estimate(recipe)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_blocks_give_the_same_weights(
    recipe: InstructionRecipe, tmp_path: Path, precision: str
) -> None:
    from mllm.model import load_mllm

    recipe.precision, recipe.steps = precision, 2  # type: ignore[assignment]
    plain = load_mllm(run_recipe(recipe))[0].state_dict()
    recipe.gradient_checkpointing, recipe.out = True, str(tmp_path / "again")
    again = load_mllm(run_recipe(recipe))[0].state_dict()
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)
