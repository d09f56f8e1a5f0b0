"""The two towers, as open_clip builds them, and the one place that knows how each is taken apart.

B batch, L tokens of a sequence (CLS first, where there is one), D width, P features after pooling.
"""

from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.model import _build_text_tower, _build_vision_tower
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from vision_moe.errors import InputError
from vision_moe.surgery import find_ffns


@dataclass(frozen=True)
class VisionStates:
    """``hidden_states``: the embeddings and then each block's output, all ``(B, L, D)``;
    ``pooled`` ``(B, P)``: normalised, before the projection to CLIP's space."""

    hidden_states: tuple[Tensor, ...]
    pooled: Tensor


@dataclass(frozen=True)
class VisionDimensions:
    """What a connector or an image processor must know of a vision tower."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int | list[int]
    patch_size: int | list[int]


def build_vision_tower(open_clip_config: dict[str, Any]) -> VisionTransformer | TimmModel:
    """open_clip's vision tower with open_clip's own random initialisation."""
    vision_cfg = dict(open_clip_config["vision_cfg"])
    if vision_cfg.get("timm_model_name"):
        vision_cfg["timm_model_pretrained"] = False        # weights come from the checkpoint
    quick_gelu = bool(open_clip_config.get("quick_gelu"))
    tower = _build_vision_tower(open_clip_config["embed_dim"], vision_cfg, quick_gelu)
    if not isinstance(tower, (VisionTransformer, TimmModel)):
        raise InputError(f"a {type(tower).__name__} vision tower has no transformer blocks")
    return tower


def build_text_tower(open_clip_config: dict[str, Any]) -> nn.Module:
    """open_clip's text tower with open_clip's own random initialisation."""
    text_cfg = dict(open_clip_config["text_cfg"])
    if text_cfg.get("hf_model_name"):
        text_cfg["hf_model_pretrained"] = False
    quick_gelu = bool(open_clip_config.get("quick_gelu"))
    tower = _build_text_tower(open_clip_config["embed_dim"], text_cfg, quick_gelu)
    if isinstance(tower, TextTransformer):
        tower.transformer.register_forward_pre_hook(_fit_causal_mask, with_kwargs=True)
    return tower


def _fit_causal_mask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    # open_clip cuts the positions of a short text but not its causal mask.
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.shape[-1] > args[0].shape[1]:
        length = args[0].shape[1]
        kwargs = {**kwargs, "attn_mask": mask[..., :length, :length]}
    return args, kwargs


def build_tokenizer(text_cfg: dict[str, Any]) -> Any:
    """The tokenizer that open_clip pairs with a text tower: texts -> ``(B, context_length)``."""
    context_length = text_cfg.get("context_length", 77)
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    if name := text_cfg.get("hf_tokenizer_name"):
        mode = text_cfg.get("tokenizer_mode")
        return open_clip.HFTokenizer(
            name, context_length=context_length, tokenizer_mode=mode, **options
        )
    return open_clip.SimpleTokenizer(context_length=context_length, **options)


def is_causal(text: nn.Module) -> bool:
    """Whether a token's features are free of what follows it, padding included."""
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and text.cls_emb is None
        and text.pool_type in ("argmax", "eos", "first")
    )


def vision_states(visual: nn.Module, pixel_values: Tensor) -> VisionStates:
    """Run a vision tower and keep every block's output.

    Args:
        visual: result of ``build_vision_tower``.
        pixel_values: ``(B, 3, H, W)``.
    """
    if isinstance(visual, VisionTransformer):
        return _open_clip_states(visual, pixel_values)
    assert isinstance(visual, TimmModel)
    return _timm_states(visual, pixel_values)


def _open_clip_states(visual: VisionTransformer, pixel_values: Tensor) -> VisionStates:
    if tuple(pixel_values.shape[-2:]) != tuple(visual.image_size):
        raise InputError(
            f"images are {tuple(pixel_values.shape[-2:])}, the tower takes {visual.image_size}"
        )
    embeddings = visual._embeds(pixel_values)                                # (B, L, D)
    last, outputs = visual.transformer.forward_intermediates(embeddings)
    pooled, _ = visual._pool(last)
    return VisionStates((embeddings, *outputs), pooled)


def _timm_states(visual: TimmModel, pixel_values: Tensor) -> VisionStates:
    trunk = visual.trunk
    if not all(hasattr(trunk, part) for part in ("patch_embed", "_pos_embed", "norm_pre")):
        raise InputError(f"timm model {type(trunk).__name__}: hidden states of a ViT only")
    x = trunk._pos_embed(trunk.patch_embed(pixel_values))
    x = trunk.norm_pre(trunk.patch_drop(x))
    hidden_states = [x]
    for block in trunk.blocks:
        hidden_states.append(block(hidden_states[-1]))
    pooled = trunk.forward_head(trunk.norm(hidden_states[-1]), pre_logits=True)
    return VisionStates(tuple(hidden_states), pooled)


def vision_dimensions(open_clip_config: dict[str, Any]) -> VisionDimensions:
    """Read a tower's dimensions from its configuration."""
    vision_cfg = open_clip_config["vision_cfg"]
    image_size = vision_cfg.get("image_size", 224)
    if vision_cfg.get("timm_model_name"):
        with torch.device("meta"):                        # shapes alone: no memory, no time
            visual = build_vision_tower(open_clip_config)
        trunk: Any = visual.trunk
        sites = find_ffns(visual)
        hidden_size = trunk.num_features
        return VisionDimensions(
            hidden_size=hidden_size,
            intermediate_size=next(sites[-1].module.parameters()).shape[0] if sites else 0,
            num_hidden_layers=len(sites),
            num_attention_heads=getattr(trunk.blocks[0].attn, "num_heads", 1),
            image_size=image_size,
            patch_size=_scalar_if_square(trunk.patch_embed.patch_size),
        )
    width = vision_cfg.get("width", 768)
    return VisionDimensions(
        hidden_size=width,
        intermediate_size=int(width * vision_cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=vision_cfg.get("layers", 12),
        num_attention_heads=width // vision_cfg.get("head_width", 64),
        image_size=_scalar_if_square(image_size),
        patch_size=_scalar_if_square(vision_cfg.get("patch_size", 16)),
    )


def _scalar_if_square(size: Any) -> int | list[int]:
    if isinstance(size, int):
        return size
    height, width = size
    return height if height == width else [height, width]


def restore_buffers(module: nn.Module) -> None:
    """Compute again the buffers that checkpoints leave out, after building on the meta device."""
    if isinstance(module, TextTransformer):
        if module.attn_mask is not None:
            mask = module.build_causal_mask()
            module.attn_mask = mask.to(module.attn_mask.device, module.attn_mask.dtype)
    elif callable(initialise := getattr(module, "init_non_persistent_buffers", None)):
        initialise()                                       # timm's own convention
