"""How a tower is shown pictures: square, padded, in tiles; and larger than it was made for.

    square  the short side resized to the tower's, the middle cropped (CLIP; LLaVA's pretraining)
    pad     padded to a square with the mean color, then resized: nothing is cropped (LLaVA-1.5)
    tiles   the picture as a whole and, at up to several times the size, in tiles (LLaVA-NeXT)

S side of the tower's input, L tokens with CLS, G patches along a side, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
)

from mllm.building import fit_processor, put_tower
from mllm.tiles import is_tiled, to_tiles
from vision_moe import InputError

ImageMode = Literal["square", "pad", "tiles"]

# LLaVA-NeXT's: multiples of the tower's side, height and width.
DEFAULT_GRID = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def image_processor_for(
    base: Any,
    image_size: int,
    mode: ImageMode = "square",
    grid: Sequence[Sequence[int]] = DEFAULT_GRID,
) -> Any:
    """A stock image processor that shows a tower its pictures in another way.

    Args:
        base: The tower's own; mean, deviation and interpolation are its.
        image_size: S.
        mode: See the head of this file.
        grid: ``tiles``: the arrangements that may be chosen from, as (rows, columns) of tiles.
    """
    crop = {"height": image_size, "width": image_size}
    if mode == "square":
        processor = copy.deepcopy(base)
        has_sides = getattr(base.size, "height", None) is not None
        processor.size = type(base.size)(**(crop if has_sides else {"shortest_edge": image_size}))
        if base.crop_size is not None:
            processor.crop_size = type(base.crop_size)(**crop)
        return processor
    shared: dict[str, Any] = {
        "size": {"shortest_edge": image_size},
        "crop_size": crop,
        "image_mean": list(base.image_mean),
        "image_std": list(base.image_std),
        "resample": base.resample,
        "rescale_factor": base.rescale_factor,
        "do_convert_rgb": True,
    }
    if mode == "pad":
        return LlavaImageProcessor(do_pad=True, **shared)
    pinpoints = [[rows * image_size, columns * image_size] for rows, columns in grid]
    return LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **shared)


def with_images(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    mode: ImageMode | None = None,
    image_size: int | None = None,
    grid: Sequence[Sequence[int]] = DEFAULT_GRID,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model and its processor, shown pictures in another way.

    Args:
        model: Its tower may be changed in place.
        processor: Its processor.
        mode: As it is by default.
        image_size: S; as it is by default.
        grid: For ``tiles``.
        seed: Of the separator of lines that tiles need.

    Raises:
        InputError: The tower, or the connector behind it, cannot take that size or mode.
    """
    tower = model.model.vision_tower
    size = image_size or tower.config.image_size
    if not isinstance(size, int):
        raise InputError(f"the tower takes pictures of {size}; only square ones can be changed")
    if size != tower.config.image_size:
        put_tower(model, resize_tower(tower, size), f"the tower at {size}")
    elif mode is None:
        return model, processor
    own: ImageMode = "pad" if getattr(processor.image_processor, "do_pad", False) else "square"
    if is_tiled(model):
        own = "tiles"
    mode = mode or own
    shown = image_processor_for(processor.image_processor, size, mode, grid)
    fit_processor(processor, model)
    if mode == "tiles":
        return to_tiles(model, processor, shown, seed)
    if is_tiled(model):
        raise InputError("a model that was trained on tiles cannot do without them")
    processor.image_processor = shown
    return model, processor


def resize_tower(tower: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The tower for another input size: its position embeddings interpolated, the rest as it is.

    Args:
        tower: Any vision transformer with learned positions.
        image_size: S, a multiple of the patch size.

    Raises:
        InputError: The size does not fit the patches, or the tower has no positions to interpolate.
    """
    config = copy.deepcopy(tower.config)
    if config.image_size == image_size:
        return tower
    patch_size = config.patch_size
    if not isinstance(patch_size, int) or image_size % patch_size or image_size < patch_size:
        raise InputError(
            f"image_size is {image_size}, it must be a multiple of the tower's patch size"
            f" {patch_size}"
        )
    described = getattr(config, "open_clip_config", None)
    if described is not None:
        described["vision_cfg"]["image_size"] = image_size
        config = type(config)(**{**config.to_dict(), "open_clip_config": described})
    else:
        config.image_size = image_size
    with torch.random.fork_rng(devices=[]):
        larger = type(tower)(config)
    own, old = larger.state_dict(), tower.state_dict()
    for name, value in old.items():
        if own[name].shape != value.shape:
            value = _interpolate(value, own[name].shape, name)
        own[name] = value
    larger.load_state_dict(own)
    weight = next(tower.parameters())
    resized: Any = larger
    resized.to(weight.device, weight.dtype).train(tower.training)
    return larger


def _interpolate(positions: Tensor, shape: torch.Size, name: str) -> Tensor:
    """``(..., L, D)`` positions on a square grid behind the CLS token, on another grid."""
    old, new = positions.shape[-2], shape[-2]
    for num_others in (0, 1):
        side, new_side = math.isqrt(old - num_others), math.isqrt(new - num_others)
        if side**2 == old - num_others and new_side**2 == new - num_others:
            break
    else:
        raise InputError(f"the tower's '{name}' is no square grid of positions")
    others, grid = positions[..., :num_others, :], positions[..., num_others:, :]
    image = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()  # (1, D, G, G)
    image = F.interpolate(
        image, (new_side, new_side), mode="bicubic", align_corners=False, antialias=new < old
    )
    grid = image.permute(0, 2, 3, 1).reshape(*shape[:-2], new_side**2, shape[-1])
    return torch.cat([others, grid.to(positions.dtype)], dim=-2)
