"""Two processes, started as users start them, make the CLIP-MoE that one makes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vision_moe
from train import run_recipe
from train.config import load_recipe
from train.contrastive import start_model

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
OVERRIDES = [
    "data={num_pairs: 600, caption: detailed}",
    "num_experts=3",
    "num_clusters=2",
    "features=training",  # of the first stage by captions, beyond a sample of 256
    "precision=fp32",
    "stage={steps: 4, batch_size: 8, lr: 1e-3, warmup_steps: 1, logit_scale: 100}",
    "stage.earlier_pairs=12",
    "attention_lr=1e-3",
    "router={steps: 4, batch_size: 8, lr: 1e-2, warmup_steps: 1, logit_scale: 100, balance: 0.5}",
    "router.earlier_pairs=12",
    "router.experts_lr=1e-3",
    "save_steps=3",
]


def launch(*arguments: str, number: int = 2) -> subprocess.CompletedProcess[str]:
    """``mllm`` in several processes; the folders are named by the arguments alone."""
    # With --cpu the launcher starts one process, whatever it is told.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", str(number), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "mllm"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
    }
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The result of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    vision_moe.save(start_model(MODEL, None, seed=0), folder / "clip")
    overrides = [*OVERRIDES, f"model={folder / 'clip'}"]
    one = run_recipe(load_recipe("quickstart_clip_moe", [*overrides, f"out={folder / 'one'}"]))
    two = folder / "two"
    done = launch("upcycle", "quickstart_clip_moe", *overrides, f"out={two}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(two)  # said once
    return one, two


def test_two_processes_have_run(both: tuple[Path, Path]) -> None:
    assert [log(out)["num_processes"] for out in both] == [1, 2]
    assert [log(stage(out, 2))["num_processes"] for out in both] == [1, 2]


def stage(out: Path, number: int) -> Path:
    return Path(f"{out}.stages") / f"stage_{number}"


def log(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "training_log.json").read_text())
    return content


@pytest.mark.parametrize("number", [1, 2])
def test_two_processes_find_the_clusters_of_one(both: tuple[Path, Path], number: int) -> None:
    one, two = (load_file(stage(out, number) / "labels.safetensors")["labels"] for out in both)
    np.testing.assert_array_equal(one, two)


def test_two_processes_have_the_losses_and_gradients_of_one(both: tuple[Path, Path]) -> None:
    for folder in (lambda out: stage(out, 1), lambda out: stage(out, 2), lambda out: out):
        one, two = (log(folder(out))["history"] for out in both)
        assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == [1, 2, 3, 4]
        for key in ("loss", "grad_norm"):
            values = [entry[key] for entry in one]
            # Worst errors measured: 1.0e-6 of a loss, 3.2e-6 of a gradient's norm.
            assert [entry[key] for entry in two] == pytest.approx(values, rel=2e-5), key


def test_two_processes_make_the_weights_of_one(both: tuple[Path, Path]) -> None:
    one, two = (vision_moe.load(out).state_dict() for out in both)
    for name, weight in one.items():
        parts = [weight, two[name]]
        if name.endswith("in_proj_bias"):  # keys' change nothing: their gradient is rounding alone
            parts = [torch.cat([p.chunk(3)[0], p.chunk(3)[2]]) for p in parts]
        # Worst error measured: 2.5e-6, after steps of 1e-3.
        torch.testing.assert_close(parts[1], parts[0], rtol=0, atol=2e-5, msg=name)


def test_two_processes_leave_what_one_leaves(both: tuple[Path, Path]) -> None:
    one, two = (
        sorted(str(path.relative_to(out.parent)).replace(out.name, "out", 1)
               for root in (out, Path(f"{out}.stages")) for path in root.rglob("*"))
        for out in both
    )  # fmt: skip
    assert one == two
