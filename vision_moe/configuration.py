"""Configurations: open_clip's own model description, and which blocks are mixtures of experts."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from vision_moe.errors import InputError
from vision_moe.towers import vision_dimensions

# open_clip's ViT-B-32.json
_VIT_B_32: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
    },
}

# OpenAI's normalisation, which nearly every CLIP kept.
OPENAI_PREPROCESS: dict[str, Any] = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def _check_keys(what: str, given: Mapping[str, Any], required: set[str]) -> None:
    if missing := sorted(required - set(given)):
        raise InputError(f"{what} lacks {', '.join(missing)}")


class CLIPMoEConfig(PreTrainedConfig):
    """Both towers.

    Args:
        open_clip_config: as in open_clip's ``model_configs/*.json``: embed_dim, vision_cfg,
            text_cfg and options; ViT-B-32 by default.
        moe: ``{"num_experts", "top_k", "vision_layers", "text_layers"}``; ``None`` is a dense CLIP.
            ``"vision_ranks"`` and ``"text_ranks"``, a number for each of the layers, make the
            tower's experts low-rank changes of the dense network. ``"router"``: fields of
            :class:`vision_moe.RouterOptions`.
        preprocess: ``{"mean", "std", "interpolation", "resize_mode"}``; what is left out is
            OpenAI's.
    """

    model_type = "clip_moe"

    open_clip_config: dict[str, Any] | None = None
    moe: dict[str, Any] | None = None
    preprocess: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Copies: two models built from one dictionary must not share it.
        self.open_clip_config = copy.deepcopy(dict(self.open_clip_config or _VIT_B_32))
        self.preprocess = {**OPENAI_PREPROCESS, **(self.preprocess or {})}
        required = {"embed_dim", "vision_cfg", "text_cfg"}
        _check_keys("open_clip_config", self.open_clip_config, required)
        if self.moe is not None:
            self.moe = copy.deepcopy(dict(self.moe))
            required = {"num_experts", "top_k", "vision_layers", "text_layers"}
            _check_keys("moe", self.moe, required)
        super().__post_init__(**kwargs)

    @property
    def vision_config(self) -> "CLIPMoEVisionConfig":
        """The vision tower alone."""
        assert self.open_clip_config is not None
        kept = ("embed_dim", "vision_cfg", "quick_gelu")
        return CLIPMoEVisionConfig(
            open_clip_config={k: v for k, v in self.open_clip_config.items() if k in kept},
            moe=self.moe and {k: v for k, v in self.moe.items() if not k.startswith("text_")},
            dtype=self.dtype,
        )


class CLIPMoEVisionConfig(PreTrainedConfig):
    """The vision tower alone, with the names that connectors and LLaVA read.

    Args:
        open_clip_config: embed_dim, vision_cfg and quick_gelu of open_clip's model description.
        moe: ``{"num_experts", "top_k", "vision_layers"}``, and ``"vision_ranks"`` for low-rank
            experts; ``None`` is a dense tower.
    """

    model_type = "clip_moe_vision"
    base_config_key = "vision_config"

    open_clip_config: dict[str, Any] | None = None
    moe: dict[str, Any] | None = None
    # Derived from open_clip_config; what is passed for them is overwritten.
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    image_size: int | list[int] | None = None
    patch_size: int | list[int] | None = None
    projection_dim: int | None = None
    num_channels: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        default = {k: v for k, v in _VIT_B_32.items() if k != "text_cfg"}
        self.open_clip_config = copy.deepcopy(dict(self.open_clip_config or default))
        _check_keys("open_clip_config", self.open_clip_config, {"embed_dim", "vision_cfg"})
        if self.moe is not None:
            self.moe = copy.deepcopy(dict(self.moe))
            _check_keys("moe", self.moe, {"num_experts", "top_k", "vision_layers"})
        for name, value in vars(vision_dimensions(self.open_clip_config)).items():
            setattr(self, name, value)
        self.projection_dim = self.open_clip_config["embed_dim"]
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """A folder with both towers gives its vision tower."""
        config, unused = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == CLIPMoEConfig.model_type:
            config = CLIPMoEConfig.from_dict(config).vision_config.to_dict()
        return config, unused
