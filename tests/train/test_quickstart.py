"""The whole quickstart on a tiny scale: what it writes, and what a second run makes again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.engine import WholeCheckpointTrainer
from train.quickstart import Scale, quickstart_recipes, run_quickstart
from vision_moe import InputError

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
STAGE_FOLDERS = ("clip", "clip_moe.stages", "clip_moe", "pretrain", "mllm", "eval")


@pytest.fixture(scope="module")
def scale(llm_folder: Path) -> Scale:
    return Scale(
        num_test_questions={"easy_vqa": 8, "scenes": 4},
        num_test_pairs=16,
        overrides={
            "quickstart_clip": [
                f"model={json.dumps(TINY_CLIP)}",
                "data.num_pairs=32",
                "training={steps: 2, batch_size: 8, lr: 1.0e-3}",
            ],
            "quickstart_clip_moe": [
                "data.num_pairs=32",
                "num_experts=3",
                "num_clusters=2",
                "stage={steps: 2, batch_size: 8, lr: 1.0e-3}",
                "router={steps: 2, batch_size: 8, lr: 1.0e-2}",
            ],
            "quickstart_pretrain": [
                f"llm={json.dumps(str(llm_folder))}",
                "data.0.num_images=8",
                "batch_rows=4",
            ],
            "quickstart_finetune": [
                "data.0.num_images=8",
                "data.1.num_images=4",
                "batch_rows=4",
            ],
        },
    )


@pytest.fixture(scope="module")
def finished(scale: Scale, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a whole run has written; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    run_quickstart(out, seed=0, scale=scale)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def files(out: Path, *folders: str) -> dict[str, int]:
    """When every file of these stages was written."""
    found = (path for folder in folders for path in (out / folder).rglob("*"))
    return {str(path): path.stat().st_mtime_ns for path in found if path.is_file()}


def read_report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def test_report_has_its_fields(finished: Path) -> None:
    report = read_report(finished)
    assert report["seed"] == 0
    assert report["versions"] and report["hardware"]
    assert set(report["seconds"]) == {
        "base_clip", "upcycle", "pretrain", "finetune", "eval", "total",
    }  # fmt: skip
    for model in ("dense", "clip_moe"):
        assert set(report["retrieval"][model]) == {"i2t_r1", "t2i_r1"}
    assert report["vqa"]["easy_vqa"]["n"] == 8
    for scores in report["vqa"].values():
        assert 0 <= scores["accuracy"] <= 1
        assert 0 <= scores["blank_image_accuracy"] <= 1


def test_page_is_written(finished: Path) -> None:
    assert "</html>" in (finished / "report.html").read_text(encoding="utf-8")


def test_folder_holds_the_stages_and_the_report_alone(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *STAGE_FOLDERS, "report.json", "report.html",
    }  # fmt: skip


def test_results_go_to_stdout_and_the_rest_to_stderr(
    finished: Path, scale: Scale, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quickstart(finished, seed=0, scale=scale)
    output = capsys.readouterr()
    assert "mllm chat" in output.out
    assert output.err.count("already there") == 5
    assert "already there" not in output.out


def test_second_run_makes_nothing_again(finished: Path, scale: Scale) -> None:
    before, seconds = files(finished, *STAGE_FOLDERS), read_report(finished)["seconds"]
    run_quickstart(finished, seed=0, scale=scale)
    assert files(finished, *STAGE_FOLDERS) == before
    assert read_report(finished)["seconds"] == seconds


@pytest.mark.parametrize("stage", ["pretrain", "eval"])
def test_deleted_stage_alone_is_made_again(copied: Path, scale: Scale, stage: str) -> None:
    shutil.rmtree(copied / stage)
    others = [folder for folder in STAGE_FOLDERS if folder != stage]
    before = files(copied, *others)
    run_quickstart(copied, seed=0, scale=scale)
    assert (copied / stage / "stage.json").is_file()
    assert files(copied, *others) == before


def test_another_seed_is_refused(finished: Path, scale: Scale) -> None:
    before = files(finished, *STAGE_FOLDERS)
    with pytest.raises(InputError, match="'seed' is 0 there and 1 now") as refusal:
        run_quickstart(finished, seed=1, scale=scale)
    assert "\n" not in str(refusal.value)
    assert files(finished, *STAGE_FOLDERS) == before


def test_interrupted_run_goes_on_from_the_stages_before(
    copied: Path, finished: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("mllm", "eval"):
        shutil.rmtree(copied / stage)
    before = files(copied, "clip", "clip_moe.stages", "clip_moe", "pretrain")
    step = WholeCheckpointTrainer.training_step

    def interrupted_step(self: WholeCheckpointTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WholeCheckpointTrainer, "training_step", interrupted_step)
        run_quickstart(copied, seed=0, scale=scale)
    assert not (copied / "mllm").exists()
    assert not list(copied.glob(".*"))

    run_quickstart(copied, seed=0, scale=scale)
    assert files(copied, "clip", "clip_moe.stages", "clip_moe", "pretrain") == before
    whole = load_file(finished / "mllm" / "model.safetensors")
    resumed = load_file(copied / "mllm" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_each_stage_starts_from_the_one_before(tmp_path: Path) -> None:
    recipes = quickstart_recipes(tmp_path, seed=3)
    assert recipes.clip_moe.model == recipes.clip.out
    assert recipes.pretrain.tower == recipes.clip_moe.out
    assert recipes.finetune.init_from == recipes.pretrain.out
    assert {recipe.seed for recipe in vars(recipes).values()} == {3}
