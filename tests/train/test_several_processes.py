"""One run on two processes: the loss and the weights of one process with the same global batch."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train
from mllm.model import load_mllm
from train import run_recipe
from train.config import save_resolved
from train.instruction import load_model
from train.recipe import (
    InstructionRecipe,
    InstructionSource,
    LLMTraining,
    RouterPartTraining,
    TowerTraining,
    Trainable,
)


@pytest.fixture
def recipe(llm_folder: Path, clip_folder: Path, tmp_path: Path) -> InstructionRecipe:
    """Five batches of up to four rows, two to a step: the last step lacks one."""
    return InstructionRecipe(
        out=str(tmp_path / "one"),
        llm=str(llm_folder),
        tower=str(clip_folder),
        data=[
            InstructionSource(
                name="scenes_questions", num_images=18, questions_per_image=2, image_size=32
            )
        ],
        trainable=Trainable(
            llm=LLMTraining(mode="lora", lr=1e-2, r=4),
            vision=TowerTraining(mode="full", lr=1e-3),
            router=RouterPartTraining(mode="full", lr=1e-3),
            experts=TowerTraining(mode="full", lr=1e-3),
        ),
        router_z=0.01,
        batch_rows=4,
        global_batch=8,
        epochs=1,
        log_steps=1,
        precision="fp32",
    )


LAUNCH = Path(train.__file__).parent / "launch"


def launch(recipe: InstructionRecipe, config: str) -> None:
    """``mllm train`` as accelerate starts it with one of the shipped configurations."""
    file = Path(f"{recipe.out}.yaml")
    save_resolved(recipe, file)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(LAUNCH / config), "-m", "mllm", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCH.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each of the processes has: the order of sums is then the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_come_to_what_one_does(recipe: InstructionRecipe, tmp_path: Path) -> None:
    alone = run_recipe(recipe)
    recipe.out = str(tmp_path / "two")
    launch(recipe, "cpu.yaml")
    logs = [
        json.loads((Path(folder) / "training_log.json").read_text())
        for folder in (alone, recipe.out)
    ]
    assert [log["num_processes"] for log in logs] == [1, 2]
    assert [log["steps"] for log in logs] == [3, 3]
    for a, b in zip(logs[0]["history"], logs[1]["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["balance_loss"] == pytest.approx(b["balance_loss"], abs=1e-6)
    one, two = (load_mllm(folder)[0].state_dict() for folder in (alone, recipe.out))
    start = load_mllm_start(recipe)
    for name, tensor in one.items():
        # Measured worst: equal.
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    changed = {name for name in start if not torch.equal(start[name], one[name])}
    assert any(".router." in name for name in changed)
    assert any(".experts.3." in name for name in changed)


def load_mllm_start(recipe: InstructionRecipe) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_model(recipe)[0].state_dict()
    return state
