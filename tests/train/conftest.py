"""A tiny dense CLIP with random weights, as a folder; and a tiny run of instruction tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vision_moe
from train import dmu
from train.contrastive import start_model
from train.recipe import (
    ConnectorTraining,
    InstructionRecipe,
    InstructionSource,
    LLMTraining,
    Trainable,
)

if TYPE_CHECKING:
    from tests.train.test_dmu import Watch


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    description = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 64, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
        },
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("base") / "clip"
    vision_moe.save(start_model(description, None, seed=0), folder)
    return folder


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Sees what each run of upcycling's trains."""
    from tests.train.test_dmu import Watch

    watch = Watch()
    monkeypatch.setattr(dmu, "train_contrastive", watch)
    return watch


@pytest.fixture
def recipe(llm_folder: Path, clip_folder: Path, tmp_path: Path) -> InstructionRecipe:
    """Connector and adapters learn from eight rendered scenes, two batches an epoch."""
    source = InstructionSource(
        name="scenes_questions", num_images=8, questions_per_image=2, image_size=32
    )
    return InstructionRecipe(
        out=str(tmp_path / "out"),
        llm=str(llm_folder),
        tower=str(clip_folder),
        data=[source],
        trainable=Trainable(
            connector=ConnectorTraining(lr=1e-2), llm=LLMTraining(mode="lora", lr=1e-2, r=4)
        ),
        batch_rows=4,
        log_steps=1,
        precision="fp32",
    )
