"""Tiled models are stock LLaVA-NeXT models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from mllm.chat import ChatSession
from mllm.generation import Request, generate_answers
from mllm.images import with_images
from mllm.model import build_llava, load_mllm, save_mllm
from mllm.tiles import num_picture_tokens, num_views, pack_views, tile_views, view_processor
from vision_moe import InputError

GRID = ((1, 2), (2, 1), (2, 2))


@pytest.fixture
def tiled(mllm: Any) -> tuple[Any, Any]:
    return with_images(*mllm, mode="tiles", grid=GRID)


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng([width, height])
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def logits(model: Any, processor: Any, *images: Image.Image) -> torch.Tensor:
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "is it red?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=list(images), text=text, return_tensors="pt")
    with torch.no_grad():
        scores: torch.Tensor = model(**inputs).logits
    return scores


def test_stock_classes_read_what_was_saved(tiled: Any, tmp_path: Any) -> None:
    save_mllm(*tiled, tmp_path / "mllm")
    model = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "mllm")
    processor = AutoProcessor.from_pretrained(tmp_path / "mllm")
    assert type(processor).__name__ == "LlavaNextProcessor"
    images = noise(100, 40), noise(30, 30)
    torch.testing.assert_close(
        logits(model, processor, *images), logits(*tiled, *images), rtol=0, atol=0
    )


def test_load_returns_the_saved_model(tiled: Any, tmp_path: Any) -> None:
    save_mllm(*tiled, tmp_path / "mllm")
    image = noise(50, 90)
    torch.testing.assert_close(
        logits(*load_mllm(tmp_path / "mllm"), image), logits(*tiled, image), rtol=0, atol=0
    )


@given(st.integers(1, 200), st.integers(1, 200))
@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_placeholders_are_as_many_as_packed_tokens(tiled: Any, height: int, width: int) -> None:
    model, processor = tiled
    views = torch.zeros(num_views(model, (height, width)), 16, 32)
    packed = pack_views(model.model, views, torch.tensor([[height, width]]))
    assert len(packed) == num_picture_tokens(model, processor, (height, width))


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (33, 31), (1, 1), (200, 200)])
def test_views_are_what_the_stock_processor_shows(tiled: Any, size: tuple[int, int]) -> None:
    processor = tiled[1].image_processor
    image = noise(*size)
    stock = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    views = tile_views(image, processor)
    pixels = view_processor(processor)(images=views, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, stock, rtol=0, atol=1e-6)


def test_separator_depends_on_the_seed_alone(mllm: Any) -> None:
    drawn = []
    for global_seed, seed in ((1, 7), (2, 7), (3, 8)):
        torch.manual_seed(global_seed)
        model, _ = with_images(*mllm, mode="tiles", grid=GRID, seed=seed)
        drawn.append(model.model.image_newline)
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_grid_of_a_tiled_model_can_be_changed(tiled: Any) -> None:
    model, processor = with_images(*tiled, mode="tiles", grid=((1, 3),))
    assert model.config.image_grid_pinpoints == [[32, 96]]
    assert logits(model, processor, noise(90, 30)).isfinite().all()


def test_tiled_model_cannot_do_without(tiled: Any) -> None:
    with pytest.raises(InputError, match="cannot do without"):
        with_images(*tiled, mode="square")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"connector": {"name": "linear"}}, "connector mlp2x_gelu"),
        ({"vision_feature_select_strategy": "full"}, "without the CLS token"),
    ],
)
def test_model_that_stock_classes_cannot_tile_is_refused(
    language_model: Any, tokenizer: Any, clip: Any, image_processor: Any, options: Any, fault: str
) -> None:
    tower = clip.to_vision_model()
    built = build_llava(language_model, tokenizer, tower, image_processor, **options)
    with pytest.raises(InputError, match=fault):
        with_images(*built, mode="tiles")


def test_model_answers_in_a_batch_and_in_a_chat_as_the_stock_class_does(tiled: Any) -> None:
    model, processor = tiled
    images = {"wide": noise(100, 40), "small": noise(20, 20), "high": noise(40, 100)}
    requests = [Request(key, "is it red?") for key in images]
    answers = generate_answers(model, processor, requests, images.__getitem__, 4, progress=False)
    for answer, image in zip(answers, images.values(), strict=True):
        content = [{"type": "image"}, {"type": "text", "text": "is it red?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        stock = processor.tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert answer == stock.strip()
        said = "".join(ChatSession(model, processor, image, max_new_tokens=4).ask("is it red?"))
        assert said.strip() == answer


def test_conversation_that_the_tiles_make_too_long_is_told(tiled: Any) -> None:
    model, processor = tiled
    model.config.text_config.max_position_embeddings = 100
    with pytest.raises(InputError, match="the language model holds 100"):
        list(ChatSession(model, processor, noise(200, 200), max_new_tokens=4).ask("is it red?"))
