"""Several towers as one: their tokens end to end, read by the stock classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)

from mllm.model import build_llava, load_mllm, save_mllm
from mllm.several_towers import join_towers


def other_tower(width: int = 32) -> CLIPVisionModel:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


@pytest.fixture
def other_processor() -> Any:
    return CLIPImageProcessor(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


@pytest.fixture
def joined(clip: Any, image_processor: Any, other_processor: Any) -> Any:
    """A CLIP-MoE tower's 16 patches, and 10 tokens of a smaller stock tower."""
    towers = [clip.to_vision_model(), other_tower()]
    processors = [image_processor, other_processor]
    return join_towers(towers, processors, layers=[-2, -1], drop_first=[True, False])


def test_tokens_of_the_towers_stand_end_to_end(joined: Any) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = joined(pixels).hidden_states[-1]
        first = joined.towers[0](pixels, output_hidden_states=True).hidden_states[-2]
    assert joined.config.num_tokens == [16, 10]
    assert tokens.shape == (2, 26, 32)
    torch.testing.assert_close(tokens[:, :16], first[:, 1:], rtol=0, atol=0)


def test_each_tower_sees_the_picture_normalised_as_its_own_processor_does(
    joined: Any, image_processor: Any, other_processor: Any
) -> None:
    plain = Image.new("RGB", (32, 32), (200, 100, 50))  # resizing changes nothing
    shared = image_processor(images=plain, return_tensors="pt")["pixel_values"]
    own = other_processor(images=plain, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(joined._as_seen_by(1, shared), own, rtol=0, atol=1e-5)


def test_folder_is_read_by_the_auto_class(joined: Any, tmp_path: Any) -> None:
    joined.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            again(pixels).hidden_states[-1], joined(pixels).hidden_states[-1], rtol=0, atol=0
        )


@pytest.mark.parametrize("connector", [None, "groups"])
def test_llava_on_several_towers_survives_saving(
    joined: Any,
    language_model: Any,
    tokenizer: Any,
    image_processor: Any,
    tmp_path: Any,
    connector: str | None,
) -> None:
    groups = [
        {"num_tokens": 16, "name": "moe_mlp", "num_experts": 2, "top_k": 1},
        {"num_tokens": 10, "name": "mlp2x_gelu"},
    ]
    model, processor = build_llava(
        language_model,
        tokenizer,
        joined,
        image_processor,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        connector=None if connector is None else {"name": "groups", "groups": groups},
    )
    assert model.config.image_seq_length == 26
    save_mllm(model, processor, tmp_path / "mllm")
    if connector is None:
        again: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "mllm")
        again_processor = AutoProcessor.from_pretrained(tmp_path / "mllm")
    else:
        again, again_processor = load_mllm(tmp_path / "mllm")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "is it red?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    with torch.no_grad():
        expected = model(**processor(images=image, text=text, return_tensors="pt")).logits
        given = again(**again_processor(images=image, text=text, return_tensors="pt")).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_towers_of_different_width_are_refused(
    clip: Any, image_processor: Any, other_processor: Any
) -> None:
    towers = [clip.to_vision_model(), other_tower(width=48)]
    with pytest.raises(ValueError, match=r"widths \[32, 48\]"):
        join_towers(towers, [image_processor, other_processor], [-2, -2], [True, True])
