"""Any-resolution tiling: the stock LLaVA-NeXT model (arXiv 2310.03744 and its successor).

A picture is shown as a whole and, enlarged to the arrangement of tiles that fits it best, tile by
tile. What the padding covers is dropped again, and a learnt separator ends each line of patches.

I pictures, T tiles of a picture and one view of it as a whole, N tokens of a view, D width of the
language model, S side of the tower's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mllm.modeling import ConnectorLlavaConfig
from vision_moe import InputError


def is_tiled(model: Any) -> bool:
    """Whether a model is shown its pictures in tiles."""
    return isinstance(model.config, LlavaNextConfig)


def to_tiles(model: Any, processor: Any, image_processor: Any, seed: int = 0) -> tuple[Any, Any]:
    """The model as a stock LLaVA-NeXT one, and its processor; the parts are taken over.

    Args:
        model: A stock LLaVA model with LLaVA's own connector, or a LLaVA-NeXT model.
        processor: Its processor.
        image_processor: A ``LlavaNextImageProcessor``.
        seed: Of the separator of lines.

    Raises:
        InputError: The connector is another, or reads the CLS token, which is no part of a grid.
    """
    old = model.config
    if isinstance(old, ConnectorLlavaConfig):
        raise InputError(
            "tiles need LLaVA's own connector mlp2x_gelu: the stock class has no other"
        )
    if old.vision_feature_select_strategy != "default":
        raise InputError(
            "tiles need 'vision_feature_select_strategy: default', without the CLS token"
        )
    if is_tiled(model):
        old.image_grid_pinpoints = image_processor.image_grid_pinpoints
        new = model
    else:
        config = LlavaNextConfig(
            vision_config=old.vision_config,
            text_config=old.text_config,
            image_token_index=old.image_token_id,
            image_seq_length=old.image_seq_length,
            image_grid_pinpoints=image_processor.image_grid_pinpoints,
            projector_hidden_act=old.projector_hidden_act,
            multimodal_projector_bias=old.multimodal_projector_bias,
            vision_feature_layer=old.vision_feature_layer,
            vision_feature_select_strategy=old.vision_feature_select_strategy,
            tie_word_embeddings=old.tie_word_embeddings,
        )
        config.pad_token_id = old.pad_token_id
        with torch.device("meta"):  # the parts exist
            new = LlavaNextForConditionalGeneration(config)
        new.model.vision_tower = model.model.vision_tower
        new.model.language_model = model.model.language_model
        new.model.multi_modal_projector = model.model.multi_modal_projector
        new.lm_head = model.lm_head
        width = old.text_config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(width, generator=generator, device="cpu") / math.sqrt(width)
        weight = next(model.model.multi_modal_projector.parameters())
        new.model.image_newline = nn.Parameter(drawn.to(weight.device, weight.dtype))
        new.generation_config = model.generation_config
    new_processor = LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    )
    return new.eval(), new_processor


def num_views(model: Any, size: tuple[int, int]) -> int:
    """``1 + T`` for a picture of that height and width."""
    pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    return int(image_size_to_num_patches(list(size), pinpoints, side))


def num_image_tokens(model: Any, processor: Any, image: Image.Image) -> int:
    """Placeholders of a picture, of any LLaVA model."""
    if not is_tiled(model):
        return int(model.config.image_seq_length)
    return num_picture_tokens(model, processor, (image.height, image.width))


def num_picture_tokens(model: Any, processor: Any, size: tuple[int, int]) -> int:
    """Placeholders of a picture of that height and width."""
    side = model.config.vision_config.image_size
    return int(processor._get_number_of_features(*size, side, side)) - 1  # without its CLS token


def tile_views(image: Image.Image, image_processor: Any) -> list[Image.Image]:
    """The picture as a whole and its tiles, ``1 + T`` pictures of side S."""
    shown = image_processor(
        images=[image], do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]  # (1 + T, 3, S, S), 0 to 255
    return [Image.fromarray(view.transpose(1, 2, 0).astype(np.uint8)) for view in shown]


def view_processor(image_processor: Any) -> CLIPImageProcessor:
    """Makes ``pixel_values`` of views, which have the tower's size already."""
    side = image_processor.crop_size["height"]
    return CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
        rescale_factor=image_processor.rescale_factor,
        resample=image_processor.resample,
    )


def pack_views(model: Any, projected: Tensor, image_sizes: Tensor) -> Tensor:
    """What the language model reads of pictures: padding dropped, lines ended.

    Args:
        model: LLaVA-NeXT's inner model, ``.model``.
        projected: ``(V, N, D)``, the views of I pictures one after another.
        image_sizes: ``(I, 2)``, heights and widths.

    Returns:
        ``(tokens of all pictures, D)``.
    """
    if not len(image_sizes):
        # The separator stays in the graph: data-parallel training waits for its gradient.
        return projected.flatten(0, 1) + 0.0 * model.image_newline
    pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    sizes: list[Sequence[int]] = image_sizes.tolist()
    counts = [int(image_size_to_num_patches(list(size), pinpoints, side)) for size in sizes]
    packed, _ = model.pack_image_features(
        projected.split(counts),
        sizes,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_newline=model.image_newline,
    )
    return torch.cat(packed)
