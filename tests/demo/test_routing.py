"""What the experts tab shows is what the routers did."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from demo.experts_view import all_blocks_table, color_of, load_table, overlay
from demo.routing import route
from mllm.chat import ChatModel
from vision_moe import CLIPMoEConfig, CLIPMoEModel

PICTURE = Image.linear_gradient("L").convert("RGB")


@pytest.fixture
def routing(chat_model):
    return route(chat_model, PICTURE)


def test_each_patch_goes_to_top_k_experts(routing):
    assert len(routing.blocks) == 3
    for block in routing.blocks:
        assert block.grid == (4, 4)
        assert block.experts.shape == block.weights.shape == (16, 2)
        np.testing.assert_allclose(block.weights.sum(-1), 1, atol=1e-6)
        assert block.tokens.sum() == 32
        assert block.first_choices.sum() == 16
        assert sum(block.load) == pytest.approx(1)


def test_routing_is_the_towers_own(chat_model, routing):
    pixels = chat_model.processor.image_processor([PICTURE], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = chat_model.model.model.vision_tower(pixels).router_logits
    for block, expected in zip(routing.blocks, logits, strict=True):
        assert (block.experts == expected[0, 1:].topk(2).indices.numpy()).all()


def test_picture_is_what_the_tower_sees(routing):
    expected = PICTURE.resize((32, 32), Image.Resampling.BICUBIC)
    difference = np.asarray(routing.image, float) - np.asarray(expected, float)
    assert abs(difference).max() <= 2


def test_overlay_has_a_colored_patch_for_each(routing):
    shown = overlay(routing, 1)
    fills = re.findall(r'fill="(#\w{6})"', shown)
    assert fills == [color_of(int(expert), 4) for expert in routing.blocks[1].experts[:, 0]]
    first = routing.blocks[1]
    assert f"expert {first.experts[0, 0]}: {first.weights[0, 0]:.0%}" in shown


def test_tables_hold_tokens_and_loads(routing):
    block = routing.blocks[0]
    cells = re.findall(r"expert \d</td><td>(\d+)</td>", load_table(block))
    assert [int(cell) for cell in cells] == block.tokens.tolist()
    assert all_blocks_table(routing, 2).count("<tr") == 4


def test_dense_tower_has_no_blocks(chat_model, _clip):
    config = CLIPMoEConfig(open_clip_config=_clip.config.open_clip_config)
    tower = CLIPMoEModel(config).to_vision_model().eval()
    model = chat_model.model
    dense = ChatModel.__new__(ChatModel)
    dense.processor = chat_model.processor
    dense.model = type("Dense", (), {"model": type("Inner", (), {"vision_tower": tower})})
    assert route(dense, PICTURE).blocks == []
    assert model is chat_model.model


def test_many_experts_have_colors_of_their_own():
    assert len({color_of(expert, 16) for expert in range(16)}) == 16
