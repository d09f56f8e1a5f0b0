"""A tiny dense CLIP with random weights, as a folder."""

from pathlib import Path

import pytest

import vision_moe
from train.contrastive import start_model


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
