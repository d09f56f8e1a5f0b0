"""Ways of showing pictures to a tower, read by stock classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
)

from mllm.images import image_processor_for, resize_tower, with_images
from mllm.model import build_llava, save_mllm
from vision_moe import CLIPMoEVisionModel, InputError


def stock_tower(image_size: int = 32) -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


def features(tower: Any, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = tower(pixels, output_hidden_states=True, **options).hidden_states[-2]
    return states


def logits(model: Any, processor: Any, image: Image.Image) -> torch.Tensor:
    content = [{"type": "image"}, {"type": "text", "text": "is it red?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    with torch.no_grad():
        inputs = processor(images=image, text=text, return_tensors="pt")
        scores: torch.Tensor = model(**inputs).logits
    return scores


@pytest.fixture
def wide() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("size", [48, 16])
def test_resized_tower_is_the_stock_interpolation(size: int) -> None:
    tower = stock_tower()
    pixels = torch.randn(2, 3, size, size)
    resized = features(resize_tower(tower, size), pixels)
    if size > 32:  # the stock class does not smooth where it shrinks
        expected = features(tower, pixels, interpolate_pos_encoding=True)
        torch.testing.assert_close(resized, expected, rtol=0, atol=0)
    assert resized.shape == (2, (size // 8) ** 2 + 1, 32)


def test_resized_clip_moe_tower_survives_saving(clip: Any, tmp_path: Any) -> None:
    tower = resize_tower(clip.to_vision_model(), 48)
    tower.save_pretrained(tmp_path)
    again = CLIPMoEVisionModel.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(features(again, pixels), features(tower, pixels), rtol=0, atol=0)
    assert again.config.image_size == 48


def test_constant_positions_stay_constant() -> None:
    tower = stock_tower()
    name = next(name for name in tower.state_dict() if "position_embedding" in name)
    weight = tower.state_dict()[name]
    with torch.no_grad():
        weight[1:] = weight[1]
    resized = resize_tower(tower, 64).state_dict()
    torch.testing.assert_close(resized[name][0], weight[0])
    torch.testing.assert_close(resized[name][1:], weight[1].expand(64, -1))


@pytest.mark.parametrize("size", [50, 4])
def test_size_that_does_not_fit_the_patches_is_told(size: int) -> None:
    with pytest.raises(InputError, match=f"image_size is {size}, .* patch size 8"):
        resize_tower(stock_tower(), size)


def test_square_crops_and_pad_does_not(image_processor: Any) -> None:
    image = Image.new("RGB", (96, 32), "black")
    image.paste((255, 255, 255), (0, 0, 32, 32))  # white at the left end
    square = image_processor_for(image_processor, 32, "square")
    pad = image_processor_for(image_processor, 32, "pad")
    cropped = square(images=image, return_tensors="pt")["pixel_values"][0]
    padded = pad(images=image, return_tensors="pt")["pixel_values"][0]
    assert cropped.shape == padded.shape == (3, 32, 32)
    assert cropped.max() == cropped[:, 16, 16].max()  # black alone
    assert padded[:, 16, 2].min() > 1.4 > -1.4 > padded[:, 16, 20].max()
    assert padded[:, 2, 16].abs().max() < 0.02  # the mean color


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_stock_classes_read_the_larger_model(
    mllm: Any, tmp_path: Any, wide: Image.Image, mode: Any
) -> None:
    model, processor = with_images(*mllm, mode=mode, image_size=48)
    assert model.config.image_seq_length == 36
    save_mllm(model, processor, tmp_path / "mllm")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "mllm")
    again_processor = AutoProcessor.from_pretrained(tmp_path / "mllm")
    torch.testing.assert_close(
        logits(again, again_processor, wide), logits(model, processor, wide), rtol=0, atol=0
    )


def test_size_alone_keeps_the_mode(mllm: Any) -> None:
    model, processor = with_images(*mllm, mode="pad")
    _, processor = with_images(model, processor, image_size=48)
    assert isinstance(processor.image_processor, LlavaImageProcessor)
    assert processor.image_processor.crop_size.height == 48


def test_connector_of_fixed_length_refuses_another_size(
    language_model: Any, tokenizer: Any, clip: Any, image_processor: Any
) -> None:
    tower = clip.to_vision_model()
    built = build_llava(
        language_model, tokenizer, tower, image_processor, connector={"name": "resampler"}
    )
    with pytest.raises(InputError, match="gives 36 tokens, .* made for 16"):
        with_images(*built, image_size=48)


@pytest.mark.parametrize("mode", ["square", "pad", "tiles"])
@pytest.mark.parametrize("size", [(1, 1), (1, 100), (3, 2)])
def test_tiny_picture_is_shown(image_processor: Any, mode: Any, size: tuple[int, int]) -> None:
    processor = image_processor_for(image_processor, 32, mode)
    pixels = processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"]
    assert pixels.shape[-3:] == (3, 32, 32)
    assert torch.as_tensor(pixels).isfinite().all()
