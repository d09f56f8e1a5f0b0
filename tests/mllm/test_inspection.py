"""Parameters and routing load of a checkpoint."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

import vision_moe
from mllm.inspection import count_parameters, draw, inspect_checkpoint
from vision_moe import InputError, MoEFeedForward


def test_active_parameters_count_top_k_experts():
    experts = [nn.Linear(4, 4) for _ in range(4)]  # 20 parameters each
    layer = MoEFeedForward(experts, width=4, top_k=2)  # and a router of 16
    assert count_parameters(nn.Sequential(layer, nn.Linear(4, 1))) == (101, 61)


def test_dense_model_is_all_active():
    assert count_parameters(nn.Linear(4, 4)) == (20, 20)


def test_clip_folder_shows_both_towers(clip_folder):
    inspection = inspect_checkpoint(clip_folder)
    assert [part.name for part in inspection.parts] == ["vision tower", "text tower", "all"]
    assert [block.name for block in inspection.blocks] == [
        "vision MoE block 0", "vision MoE block 1", "vision MoE block 2",
        "text MoE block 0", "text MoE block 1",
    ]  # fmt: skip


def test_load_of_a_block_sums_to_one(clip_folder):
    for block in inspect_checkpoint(clip_folder).blocks:
        assert sum(block.load) == pytest.approx(1.0, abs=1e-6)


def test_mllm_folder_shows_its_parts(mllm_folder):
    inspection = inspect_checkpoint(mllm_folder)
    names = ["vision tower", "connector", "language model", "all"]
    assert [part.name for part in inspection.parts] == names
    assert len(inspection.blocks) == 3


def test_tied_weights_are_counted_once(mllm_folder):
    sizes = {part.name: part.total for part in inspect_checkpoint(mllm_folder).parts}
    assert sizes["all"] == sum(size for name, size in sizes.items() if name != "all")


def test_own_pictures_are_routed(clip_folder, tmp_path):
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "blue.png")
    blocks = inspect_checkpoint(clip_folder, [tmp_path / "blue.png"]).blocks
    assert all(block.name.startswith("vision") for block in blocks)


def test_dense_folder_says_so(tmp_path):
    torch.manual_seed(0)
    description = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1,
        },
    }  # fmt: skip
    clip = vision_moe.CLIPMoEModel(vision_moe.CLIPMoEConfig(open_clip_config=description))
    vision_moe.save(clip, tmp_path / "dense")
    inspection = inspect_checkpoint(tmp_path / "dense")
    assert inspection.blocks == []
    assert "no experts: a dense model" in inspection.table()
    draw(inspection, tmp_path / "dense.png")
    assert Image.open(tmp_path / "dense.png").width > 100


def test_table_has_a_row_for_each_part_and_block(clip_folder):
    inspection = inspect_checkpoint(clip_folder)
    assert len(inspection.table().splitlines()) == 1 + 3 + 1 + 2 + 5


def test_picture_is_written(clip_folder, tmp_path):
    draw(inspect_checkpoint(clip_folder), tmp_path / "new" / "routing.png")
    assert Image.open(tmp_path / "new" / "routing.png").format == "PNG"


def test_unknown_picture_type_is_told(clip_folder, tmp_path):
    with pytest.raises(InputError, match="routing.xyz"):
        draw(inspect_checkpoint(clip_folder), tmp_path / "routing.xyz")


def test_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(InputError, match="absent"):
        inspect_checkpoint(tmp_path / "absent")
