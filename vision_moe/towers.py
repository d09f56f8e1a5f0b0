"""The two towers, as open_clip builds them, and the one place that knows how each is taken apart.

B batch, L tokens of a sequence (CLS first, where there is one), D width, P features after pooling.
"""

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import open_clip
import torch
from open_clip.model import _build_text_tower, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from vision_moe.errors import InputError
from vision_moe.surgery import find_ffns


@dataclass(frozen=True)
class VisionStates:
    """``hidden_states``: the embeddings and then each block's output, all ``(B, L, D)``; L and D
    of a convolutional tower change from stage to stage, and its maps are read row by row.
    ``pooled`` ``(B, P)``: normalised, before the projection to CLIP's space where there is one."""

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


def build_vision_tower(open_clip_config: dict[str, Any]) -> nn.Module:
    """open_clip's vision tower with open_clip's own random initialisation."""
    # CoCa asks for its decoder's tokens too, and there is no decoder here.
    vision_cfg = {**open_clip_config["vision_cfg"], "output_tokens": False}
    if vision_cfg.get("timm_model_name"):
        vision_cfg["timm_model_pretrained"] = False        # weights come from the checkpoint
    quick_gelu = bool(open_clip_config.get("quick_gelu"))
    tower: nn.Module = _build_vision_tower(open_clip_config["embed_dim"], vision_cfg, quick_gelu)
    return tower


def build_text_tower(open_clip_config: dict[str, Any]) -> nn.Module:
    """open_clip's text tower with open_clip's own random initialisation."""
    text_cfg = {**open_clip_config["text_cfg"], "output_tokens": False}
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
    if isinstance(visual, ModifiedResNet):
        layers = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        return _watched_states([b for layer in layers for b in layer], visual, pixel_values)
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


def image_and_patch_features(
    visual: nn.Module, pixel_values: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    """A picture in CLIP's joint space twice: as CLIP puts it there, and by its patch tokens, each
    put there as the class token is (MaskCLIP, arXiv 2112.01071), in the mean.

    Args:
        visual: result of ``build_vision_tower``, a ViT of open_clip's.
        pixel_values: ``(B, 3, H, W)``.
        layer: Whose output the patch tokens are, as an MLLM counts: -1 is the last block's.

    Returns:
        ``(B, P)`` twice.

    Raises:
        InputError: The tower's patch tokens cannot be put there, or it has no such layer.
    """
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise InputError(
            "patch tokens can be put into the joint space by a ViT of open_clip's without"
            " attention pooling, not by this vision tower; leave 'patch_loss' at 0"
        )
    states = vision_states(visual, pixel_values)
    num_states = len(states.hidden_states)
    if not -num_states <= layer < num_states:
        raise InputError(f"there is no layer {layer}: the tower has {num_states - 1} blocks")
    patches = visual.ln_post(states.hidden_states[layer][:, 1:]).mean(dim=1)
    if visual.proj is None:
        return states.pooled, patches
    return states.pooled @ visual.proj, patches @ visual.proj


def _timm_states(visual: TimmModel, pixel_values: Tensor) -> VisionStates:
    trunk: Any = visual.trunk

    def pooled(x: Tensor) -> Tensor:
        features: Tensor = trunk.forward_head(trunk.forward_features(x), pre_logits=True)
        return features if features.dim() == 2 else visual.head.pool(features)

    channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    return _watched_states(_timm_blocks(trunk), pooled, pixel_values, channels_last)


def _timm_blocks(trunk: nn.Module) -> list[nn.Module]:
    """A ViT's ``blocks``; of a tower in stages the ``blocks`` of each."""
    blocks = getattr(trunk, "blocks", None)
    if isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        return list(blocks)
    found = [m for name, m in trunk.named_modules() if name.rsplit(".", 1)[-1] == "blocks"]
    if not found:
        raise InputError(
            f"a vision tower of timm's {type(trunk).__name__} has no blocks whose outputs a"
            " language model could read; its text tower can be upcycled, and images be encoded"
        )
    return [block for container in found for block in container.children()]


def _watched_states(
    blocks: Sequence[nn.Module],
    run: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    channels_last: bool = False,
) -> VisionStates:
    """Keep what goes into the first block and comes out of each while ``run`` pools an image."""
    thread = threading.get_ident()                         # requests served side by side: this one
    states: dict[int, Tensor] = {}

    def tokens(x: Tensor) -> Tensor:
        if x.dim() == 3:
            return x
        return x.flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)

    def before(_module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() == thread:
            states[0] = tokens(inputs[0])

    def after(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if threading.get_ident() == thread:
                states[number] = tokens(output)

        return hook

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(before).remove)
        for number, block in enumerate(blocks, start=1):
            stack.callback(block.register_forward_hook(after(number)).remove)
        pooled = run(pixel_values)
    return VisionStates(tuple(states[number] for number in range(len(blocks) + 1)), pooled)


def vision_dimensions(open_clip_config: dict[str, Any]) -> VisionDimensions:
    """Read a tower's dimensions from its configuration."""
    vision_cfg = open_clip_config["vision_cfg"]
    image_size = vision_cfg.get("image_size", 224)
    width = vision_cfg.get("width", 768)
    if vision_cfg.get("timm_model_name") or isinstance(vision_cfg.get("layers"), (list, tuple)):
        return _measured_dimensions(json.dumps(open_clip_config, sort_keys=True))
    return VisionDimensions(
        hidden_size=width,
        intermediate_size=int(width * vision_cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=vision_cfg.get("layers", 12),
        num_attention_heads=width // vision_cfg.get("head_width", 64),
        image_size=_scalar_if_square(image_size),
        patch_size=_scalar_if_square(vision_cfg.get("patch_size", 16)),
    )


@lru_cache(maxsize=32)
def _measured_dimensions(open_clip_config: str) -> VisionDimensions:
    """Dimensions of a tower whose configuration does not tell them, from a blank picture."""
    description = json.loads(open_clip_config)
    size = description["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"), torch.no_grad():            # shapes alone: no memory, no time
        visual = build_vision_tower(description).eval()
        try:
            states = vision_states(visual, torch.zeros(1, 3, height, width)).hidden_states
        except InputError:                                 # images are encoded, no more
            trunk: Any = visual.trunk
            return VisionDimensions(trunk.num_features, 0, 0, 1, size, 32)
    sites = find_ffns(visual)
    num_tokens, hidden_size = states[-1].shape[1:]
    # A few tokens beside those of the map: CLS, registers.
    patch = round((height * width / num_tokens) ** 0.5)
    while (height // patch) * (width // patch) > num_tokens:
        patch += 1
    heads = [getattr(module, "num_heads", None) for module in visual.modules()]
    return VisionDimensions(
        hidden_size=hidden_size,
        intermediate_size=sites[-1].hidden_size if sites else 0,
        num_hidden_layers=len(states) - 1,
        num_attention_heads=next((h for h in reversed(heads) if isinstance(h, int)), 1),
        image_size=_scalar_if_square(size),
        patch_size=patch,
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
