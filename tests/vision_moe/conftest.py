"""A tiny CLIP and a tiny CLIP-MoE, real open_clip towers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vision_moe

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}

CAPTIONS = ["a red circle", "two small blue squares on a green field", "!"]


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    return TINY


@pytest.fixture
def dense_clip() -> vision_moe.CLIPMoEModel:
    torch.manual_seed(0)
    return vision_moe.CLIPMoEModel(vision_moe.CLIPMoEConfig(open_clip_config=TINY)).eval()


@pytest.fixture
def perturb() -> Callable[[dict[str, torch.Tensor], int], dict[str, torch.Tensor]]:
    """Another expert: the given weights with noise."""

    def perturbed(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            key: value + 0.1 * torch.randn(value.shape, generator=generator)
            for key, value in state.items()
        }

    return perturbed


@pytest.fixture
def moe_clip(dense_clip: vision_moe.CLIPMoEModel, perturb: Any) -> vision_moe.CLIPMoEModel:
    base = vision_moe.ffn_state_dict(dense_clip)
    experts = [base] + [perturb(base, seed) for seed in (1, 2, 3)]
    return vision_moe.upcycle(dense_clip, experts, top_k=2)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def tokens(dense_clip: vision_moe.CLIPMoEModel) -> torch.Tensor:
    return dense_clip.tokenizer(CAPTIONS)
