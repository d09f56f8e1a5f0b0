"""Routers that take part in a training step: their losses, their gradients, their curves."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mllm.prompts import ChatPrompts
from train.instruction_data import collate
from train.instruction_model import InstructionModel
from train.instruction_rows import InstructionSample, RowLimits, chat_row
from train.parts import set_trainable
from train.pictures import PixelValues
from train.recipe import (
    InstructionRecipe,
    InstructionSource,
    RouterPartTraining,
    TowerTraining,
    Trainable,
)
from train.router_losses import RouterSettings, router_settings, router_z_loss
from vision_moe import load_balancing_loss


def picture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def batch_of(mllm: Any, *image_keys: int) -> dict[str, Tensor]:
    model, processor = mllm
    prompts = ChatPrompts(processor, model.config.image_seq_length)
    limits = RowLimits(prompts.image_token_id, lambda _: model.config.image_seq_length, 512)
    sample = InstructionSample(image_keys, (("what is the color?", "red"), ("how many?", "two")))
    pixels = PixelValues([lambda: picture(0)], processor.image_processor)
    return collate([chat_row(sample, prompts, limits)], pixels, pad_token_id=2)


@pytest.fixture
def batch(mllm: Any) -> dict[str, Tensor]:
    return batch_of(mllm, 0)


def recipe(**settings: Any) -> InstructionRecipe:
    return InstructionRecipe(out="", data=[InstructionSource(name="easy_vqa")], **settings)


def all_of_the_tower() -> Trainable:
    return Trainable(
        vision=TowerTraining(mode="full"),
        router=RouterPartTraining(mode="full"),
        experts=TowerTraining(mode="full"),
    )


def test_z_loss_of_equal_logits() -> None:
    """logsumexp of four zeros is log 4."""
    assert router_z_loss(torch.zeros(5, 4)).item() == pytest.approx(np.log(4) ** 2)


def test_pixels_and_kept_features_give_the_same_loss(mllm: Any, batch: dict[str, Tensor]) -> None:
    model, _ = mllm
    wrapped = InstructionModel(model).eval()
    with torch.no_grad():
        states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
        kept = states.hidden_states[-2][:, 1:]
        pixels = batch.pop("pixel_values")
        from_pixels = wrapped(**batch, pixel_values=pixels)["loss"]
        assert from_pixels == wrapped(**batch, image_features=kept)["loss"]


def test_losses_are_added_with_their_weights(mllm: Any, batch: dict[str, Tensor]) -> None:
    model, _ = mllm
    settings = recipe(trainable=all_of_the_tower(), balance=0.5, router_z=0.25)
    parts = set_trainable(model, settings.trainable)
    plain = InstructionModel(model).eval()(**batch)["loss"]
    routing = router_settings(settings, model, parts)
    routed = InstructionModel(model, routing).eval()(**batch)["loss"]
    logits = model.model.vision_tower(batch["pixel_values"]).router_logits[:2]  # the last is unread
    z = torch.stack([router_z_loss(one) for one in logits]).mean()
    expected = plain + 0.5 * load_balancing_loss(logits) + 0.25 * z
    torch.testing.assert_close(routed, expected)


def test_losses_of_a_steps_batches_add_up_to_their_weighted_mean(
    mllm: Any, batch: dict[str, Tensor]
) -> None:
    model, _ = mllm
    parts = set_trainable(model, all_of_the_tower())
    settings = router_settings(recipe(trainable=all_of_the_tower()), model, parts)
    wrapped = InstructionModel(model, settings).eval()
    labels = batch["labels"].numel()
    twice = 2 * wrapped(**batch, num_items_in_batch=2 * labels)["loss"]
    torch.testing.assert_close(twice, wrapped(**batch)["loss"])


def test_every_trained_parameter_of_the_tower_gets_a_gradient(
    mllm: Any, batch: dict[str, Tensor]
) -> None:
    model, _ = mllm
    parts = set_trainable(model, all_of_the_tower())
    settings = router_settings(recipe(trainable=all_of_the_tower()), model, parts)
    InstructionModel(model, settings)(**batch)["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    routers = parts.parameters["router"]
    assert len(routers) == 2 and all(p.grad is not None and p.grad.any() for p in routers)


def test_batch_of_text_alone_gives_the_tower_gradients_of_zero(mllm: Any) -> None:
    model, _ = mllm
    parts = set_trainable(model, all_of_the_tower())
    settings = router_settings(recipe(trainable=all_of_the_tower()), model, parts)
    wrapped = InstructionModel(model, settings)
    wrapped(**batch_of(mllm))["loss"].backward()
    gradients = [p.grad for part in ("vision", "router", "experts") for p in parts.parameters[part]]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert wrapped.pop_curves() == {}


def test_curves_of_every_block_that_takes_part(mllm: Any, batch: dict[str, Tensor]) -> None:
    model, _ = mllm
    parts = set_trainable(model, all_of_the_tower())
    wrapped = InstructionModel(
        model, router_settings(recipe(trainable=all_of_the_tower()), model, parts)
    )
    for _ in range(3):
        wrapped(**batch)
    curves = wrapped.pop_curves()
    loads = {f"router_load/vision_{b}/expert_{e}" for b in (0, 1) for e in range(4)}
    assert curves.keys() == {"balance_loss", "router_z_loss", *loads}
    assert sum(curves[f"router_load/vision_1/expert_{e}"] for e in range(4)) == pytest.approx(1)
    assert 1 <= curves["balance_loss"] <= 4
    assert wrapped.pop_curves() == {}


def test_frozen_tower_has_no_router_losses(mllm: Any) -> None:
    model, _ = mllm
    settings = recipe()
    parts = set_trainable(model, settings.trainable)
    assert router_settings(settings, model, parts) == RouterSettings(balance=0.01)
