"""Which expert each patch of a picture went to.

N patches, E experts, K top-k, L tokens (CLS and patches).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm.chat import ChatModel
from vision_moe import moe_layers, record_routing


@dataclass(frozen=True)
class BlockRouting:
    """One MoE block.

    Attributes:
        name: ``block 3``, by the order of the MoE blocks.
        grid: Rows and columns of patches; towers side by side differ in it.
        experts: ``(N, K)``, the heaviest first.
        weights: ``(N, K)``, each row summing to one.
        num_experts: E.
    """

    name: str
    grid: tuple[int, int]
    experts: np.ndarray
    weights: np.ndarray
    num_experts: int

    @property
    def load(self) -> list[float]:
        """The share of the picture's N * K choices that fell on each expert."""
        return (self.tokens / self.experts.size).tolist()

    @property
    def tokens(self) -> np.ndarray:
        """``(E,)`` patches that went to each expert; a patch goes to K of them."""
        return np.bincount(self.experts.ravel(), minlength=self.num_experts)

    @property
    def first_choices(self) -> np.ndarray:
        """``(E,)`` patches whose heaviest expert each was."""
        return np.bincount(self.experts[:, 0], minlength=self.num_experts)


@dataclass(frozen=True)
class Routing:
    """A picture's way through the tower; ``image`` is what the tower sees of it.

    A dense tower has no ``blocks``.
    """

    image: Image.Image
    blocks: list[BlockRouting]

    def as_json(self) -> dict[str, Any]:
        """What the API returns."""
        return {
            "blocks": [
                {
                    "name": block.name,
                    "grid": list(block.grid),
                    "load": block.load,
                    "tokens": block.tokens.tolist(),
                    "experts": block.experts.tolist(),
                    "weights": block.weights.round(4).tolist(),
                }
                for block in self.blocks
            ],
        }


def route(chat: ChatModel, picture: Image.Image) -> Routing:
    """Run the tower on one picture and read its routers."""
    tower = chat.model.model.vision_tower
    weight = next(tower.parameters())
    processor: Any = chat.processor
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]  # (1,3,H,W)
    if pixels.dim() == 5:  # a model that is shown tiles: the first view is the whole picture
        pixels = pixels[:, 0]
    layers = moe_layers(tower)
    blocks = []
    if layers:
        with torch.inference_mode(), record_routing(tower) as record:
            tower(pixels.to(weight.device, weight.dtype))
        for number, (name, layer) in enumerate(layers.items()):
            logits = record.router_logits[name][0]  # (L, E)
            grid = _grid(tower.config, pixels, len(logits))
            num_patches = grid[0] * grid[1]
            weights, experts = layer.route(logits[-num_patches:])  # without CLS, which is first
            blocks.append(
                BlockRouting(
                    f"block {number}",
                    grid,
                    experts.cpu().numpy(),
                    weights.float().cpu().numpy(),
                    layer.num_experts,
                )
            )
    return Routing(_visible(pixels[0], processor.image_processor), blocks)


def _grid(config: Any, pixels: Tensor, num_tokens: int) -> tuple[int, int]:
    """Rows and columns of patches among the tokens of a block."""
    height, width = pixels.shape[-2:]
    if height == width:  # whatever the patches of a tower among several are
        return (math.isqrt(num_tokens),) * 2
    return height // config.patch_size, width // config.patch_size


def _visible(pixels: Tensor, image_processor: Any) -> Image.Image:
    """The picture that the normalised ``(3, H, W)`` pixels are of."""
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    values = (pixels.float() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(values.round().byte().permute(1, 2, 0).numpy())
