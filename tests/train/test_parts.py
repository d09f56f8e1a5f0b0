"""Which parameters a recipe's parts freeze, adapt and train."""

from typing import Any

import pytest
import torch
from torch import nn

from train.parts import PARTS, parts_of, set_trainable
from train.recipe import (
    ConnectorTraining,
    LLMTraining,
    RouterPartTraining,
    TowerTraining,
    Trainable,
)
from vision_moe import InputError


def trainable(**modes: str) -> Trainable:
    kinds: dict[str, Any] = {
        "connector": ConnectorTraining,
        "llm": LLMTraining,
        "llm_router": RouterPartTraining,
        "vision": TowerTraining,
        "router": RouterPartTraining,
        "experts": TowerTraining,
    }
    return Trainable(**{
        part: kind(mode=modes.get(part, "frozen"), r=2) for part, kind in kinds.items()
    })


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_parameter_belongs_to_a_part(mllm: Any) -> None:
    model, _ = mllm
    part_of = parts_of(model)
    assert part_of.keys() == {name for name, _ in model.named_parameters()}
    assert set(part_of.values()) == set(PARTS) - {"llm_router"}  # the language model is dense


@pytest.mark.parametrize("part", ["connector", "llm", "vision", "router", "experts"])
def test_full_part_trains_alone(mllm: Any, part: str) -> None:
    model, _ = mllm
    set_trainable(model, trainable(**{part: "full"}))
    part_of = parts_of(model)
    assert {part_of[name] for name in trained(model)} == {part}


@pytest.mark.parametrize("part", ["connector", "llm", "vision", "router", "experts"])
def test_adapters_of_a_part_stay_in_it(mllm: Any, part: str) -> None:
    model, _ = mllm
    places = {
        "connector": "multi_modal_projector",
        "llm": "language_model.layers",
        "vision": ".attn.",
        "router": ".router.",
        "experts": ".experts.",
    }
    set_trainable(model, trainable(**{part: "lora"}))
    names = trained(model)
    assert names and all(".lora_" in name and places[part] in name for name in names)


def test_parts_of_the_tower_take_different_modes(mllm: Any) -> None:
    model, _ = mllm
    parts = set_trainable(model, trainable(vision="lora", experts="lora", router="full"))
    experts = [name for name in trained(model) if ".experts." in name]
    assert experts and all(".lora_" in name for name in experts)
    assert parts.parameters.keys() == {"vision", "router", "experts"}


def test_blocks_that_the_connector_does_not_read_stay_frozen(mllm: Any) -> None:
    """Three blocks, the second last is read."""
    model, _ = mllm
    set_trainable(model, trainable(vision="full", router="full", experts="full"))
    names = trained(model)
    assert any("resblocks.1." in name for name in names)
    assert not any("resblocks.2." in name or "ln_post" in name for name in names)


def test_all_parts_adapted_then_merged_compute_the_same(mllm: Any) -> None:
    model, processor = mllm
    parts = set_trainable(
        model,
        trainable(connector="lora", llm="lora", vision="lora", router="lora", experts="lora"),
    )
    with torch.no_grad():
        for one in parts.parameters.values():
            for parameter in one:
                parameter.normal_(std=0.05)
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[1] + [model.config.image_token_id] * 16 + [7, 8]] * 2)
    before = model(input_ids=ids, pixel_values=pixels).logits
    parts.merge()
    after = model(input_ids=ids, pixel_values=pixels).logits
    # Measured worst: 1.4e-5 of logits up to 6.7.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_part_that_the_model_lacks_is_refused(mllm: Any) -> None:
    with pytest.raises(InputError, match=r"trainable\.llm_router.*no such part"):
        set_trainable(mllm[0], trainable(llm_router="full"))
