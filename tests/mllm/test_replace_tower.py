"""A CLIP-MoE in the place of a stock CLIP, in LLaVA and LLaVA-NeXT checkpoints of another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

import vision_moe
from mllm.images import ImageMode, with_images
from mllm.model import build_llava, replace_vision_tower, save_mllm
from vision_moe import CLIPMoEVisionModel

GRID = ((1, 2), (2, 1), (2, 2))


@pytest.fixture
def stock(language_model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """9 patches of 16 pixels, where the CLIP-MoE has 16 of 8."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=48, patch_size=16,
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    return build_llava(language_model, tokenizer, CLIPVisionModel(config).eval(), images)


def answer(model: Any, processor: Any) -> torch.Tensor:
    image = Image.linear_gradient("L").convert("RGB").resize((90, 40))
    content = [{"type": "image"}, {"type": "text", "text": "is it red?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits


@pytest.mark.parametrize("mode", ["square", "pad", "tiles"])
def test_replaced_tower_answers_and_stock_classes_read_it(
    stock: Any, clip_folder: Path, tmp_path: Path, mode: ImageMode
) -> None:
    model, processor = with_images(*stock, mode=mode, grid=GRID)
    before = answer(model, processor)
    assert replace_vision_tower(model, clip_folder, processor) is model
    after = answer(model, processor)
    assert after.isfinite().all() and after.shape != before.shape     # other numbers of tokens
    save_mllm(model, processor, tmp_path / "new")
    is_tiled = mode == "tiles"
    stock_class: Any = (
        LlavaNextForConditionalGeneration if is_tiled else LlavaForConditionalGeneration
    )
    loaded = stock_class.from_pretrained(tmp_path / "new")
    assert isinstance(loaded.model.vision_tower, CLIPMoEVisionModel)
    again = AutoProcessor.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(answer(loaded, again), after, atol=1e-5, rtol=0)
    if is_tiled:
        assert loaded.config.image_grid_pinpoints == [[32, 64], [64, 32], [64, 64]]
        assert again.image_processor.image_grid_pinpoints == [[32, 64], [64, 32], [64, 64]]
    if mode == "pad":
        assert again.image_processor.do_pad


def test_low_rank_tower_takes_the_place(stock: Any, clip: Any, tmp_path: Path) -> None:
    vision_moe.to_low_rank(clip, rank=2)
    vision_moe.save(clip, tmp_path / "low_rank")
    model, processor = stock
    replace_vision_tower(model, tmp_path / "low_rank", processor)
    expected = answer(model, processor)
    save_mllm(model, processor, tmp_path / "new")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(answer(loaded, processor), expected, atol=1e-5, rtol=0)
