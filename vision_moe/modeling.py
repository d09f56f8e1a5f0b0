"""CLIP-MoE as Hugging Face models: both towers, and the vision tower that LLaVA holds.

B batch, L tokens of a sequence, D width, P dimensions of CLIP's common space, E experts.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from vision_moe.configuration import OPENAI_PREPROCESS, CLIPMoEConfig, CLIPMoEVisionConfig
from vision_moe.errors import InputError
from vision_moe.preprocessing import build_preprocess, image_processor_config
from vision_moe.routers import RouterOptions
from vision_moe.routing import record_routing
from vision_moe.surgery import block_classes, insert_moe
from vision_moe.tokenizers import transformers_tokenizer
from vision_moe.towers import (
    build_text_tower,
    build_tokenizer,
    build_vision_tower,
    image_and_patch_features,
    is_causal,
    restore_buffers,
    vision_states,
)


@dataclass
class CLIPMoEOutput(ModelOutput):
    """``image_features`` and ``text_features`` ``(B, P)``, not normalised; ``router_logits``: one
    ``(B, L, E)`` tensor for each MoE block, vision first, empty for a dense model.

    ``logits_per_image`` ``(images, texts)`` and its transpose, where there are both: cosines times
    the temperature's inverse.
    """

    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class CLIPMoEVisionOutput(BaseModelOutputWithPooling):
    """What ``CLIPVisionModel`` returns, and ``router_logits``: ``(B, L, E)`` for each MoE block."""

    router_logits: tuple[Tensor, ...] | None = None


def _insert_moe(tower: nn.Module, moe: dict[str, Any], name: str) -> None:
    ranks = moe.get(f"{name}_ranks")
    try:
        router = RouterOptions(**moe.get("router", {}))
    except TypeError as error:
        raise InputError(f"moe.router: {error}") from error
    layers = moe[f"{name}_layers"]
    insert_moe(tower, layers, moe["num_experts"], moe["top_k"], ranks=ranks, router=router)


# CoCa's captioning decoder is left out: contrastive training gives it no gradient, an MLLM has a
# language model in its place, and neither of the two towers reads it.
_DECODER = "text_decoder."


def open_clip_description(name: str, pretrained: str | None = None) -> dict[str, Any]:
    """open_clip's description of one of its models, with the activation of its weights.

    Args:
        name: as open_clip lists it.
        pretrained: a tag of its weights.
    """
    description: dict[str, Any] | None = open_clip.get_model_config(name)
    if description is None:
        raise InputError(f"open_clip knows no model named {name!r}")
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    # Weights that were trained with QuickGELU are degraded by exact GELU.
    description["quick_gelu"] = bool(description.get("quick_gelu") or tag.get("quick_gelu"))
    description.pop("custom_text", None)
    description.pop("multimodal_cfg", None)
    return description


class _CLIPMoEPreTrainedModel(PreTrainedModel):
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # open_clip's attention calls PyTorch's scaled_dot_product_attention, which picks the kernel:
    # whatever a surrounding model asks for is already served.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _gradient_checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass; the switch that transformers
        looks for, here and in a LLaVA around the tower."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._gradient_checkpointing = enable
        for tower in self.children():
            if callable(switch := getattr(tower, "set_grad_checkpointing", None)):
                switch(enable)

    def _init_weights(self, module: nn.Module) -> None:
        """Weights keep open_clip's initialisation; this only mends what the meta device lost."""
        restore_buffers(module)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that lacks weights is refused.

        Weights on the CPU are moved out of the mapped file, where they lie unaligned: kernels then
        round differently from the model that was saved.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise InputError(f"{name}: {len(missing)} weights are missing, {missing[0]} first")
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        return (model, info) if output_loading_info else model


class CLIPMoEVisionModel(_CLIPMoEPreTrainedModel):
    """The vision tower, a drop-in for ``CLIPVisionModel``."""

    config_class = CLIPMoEVisionConfig
    base_model_prefix = ""
    # Loading from a folder that holds both towers is normal use.
    _keys_to_ignore_on_load_unexpected = [r"^text\.", r"^logit_scale$", r"^logit_bias$"]

    def __init__(self, config: CLIPMoEVisionConfig) -> None:
        super().__init__(config)
        assert config.open_clip_config is not None
        self.visual = build_vision_tower(config.open_clip_config)
        if config.moe is not None:
            _insert_moe(self.visual, config.moe, "vision")
        # A block stays whole where weights are spread over devices: its router picks any expert.
        self._no_split_modules = block_classes(self.visual)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        **_kwargs: Any,
    ) -> CLIPMoEVisionOutput | tuple[Any, ...]:
        """Encode images.

        Args:
            pixel_values: ``(B, 3, H, W)``.
            output_hidden_states: transformers also passes the index of a layer for "yes, that one".
            return_dict: a tuple instead, when false.

        Returns:
            last_hidden_state ``(B, L, D)``: the last block's output; pooler_output ``(B, D)``: its
            CLS after the final layer norm; hidden_states, if asked for: the embeddings and each
            block's output, ``(B, L, D)``; router_logits: ``(B, L, E)`` for each MoE block.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        with record_routing(self) as record:
            states = vision_states(self.visual, pixel_values.to(self.dtype))
        # `is not False`: layer 0 is a layer.
        keep = output_hidden_states is not None and output_hidden_states is not False
        output = CLIPMoEVisionOutput(
            last_hidden_state=states.hidden_states[-1],
            pooler_output=states.pooled,
            hidden_states=states.hidden_states if keep else None,
            router_logits=tuple(record.router_logits.values()),
        )
        as_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return output.to_tuple() if as_tuple else output


class CLIPMoEModel(_CLIPMoEPreTrainedModel):
    """A CLIP with open_clip's towers, dense or with mixtures of experts.

    ``preprocess(pil_image)`` gives ``(3, H, W)``, ``tokenizer(texts)`` gives ``(B, L)`` int64.
    """

    config_class = CLIPMoEConfig
    base_model_prefix = ""

    def __init__(self, config: CLIPMoEConfig) -> None:
        super().__init__(config)
        assert config.open_clip_config is not None and config.preprocess is not None
        description = config.open_clip_config
        self.visual = build_vision_tower(description)
        self.text = build_text_tower(description)
        shape = [1] if description.get("nonscalar_logit_scale") else []
        # 1 / 0.07: the temperature that CLIP starts with.
        start = description.get("init_logit_scale", math.log(1 / 0.07))
        self.logit_scale = nn.Parameter(torch.full(shape, start))
        self.logit_bias: nn.Parameter | None = None
        if (bias := description.get("init_logit_bias")) is not None:
            self.logit_bias = nn.Parameter(torch.full(shape, float(bias)))
        if config.moe is not None:
            _insert_moe(self.visual, config.moe, "vision")
            _insert_moe(self.text, config.moe, "text")
        image_size = description["vision_cfg"].get("image_size", 224)
        self.preprocess = build_preprocess(image_size, **config.preprocess)
        self._no_split_modules = block_classes(self.visual) | block_classes(self.text)
        self.post_init()

    @classmethod
    def from_open_clip(cls, name: str, pretrained: str | None = None) -> "CLIPMoEModel":
        """A dense CLIP with the weights of any open_clip model.

        Args:
            name: as open_clip lists it, such as ``ViT-L-14-336``.
            pretrained: a tag such as ``openai``, or a file; random weights without.
        """
        description = open_clip_description(name, pretrained)
        source = open_clip.create_model(
            name,
            pretrained=pretrained,
            force_custom_text=True,
            force_quick_gelu=description["quick_gelu"],
        )
        used = open_clip.get_model_preprocess_cfg(source)
        preprocess = {key: used[key] for key in OPENAI_PREPROCESS if used.get(key)}
        model = cls(CLIPMoEConfig(open_clip_config=description, preprocess=preprocess))
        weights = source.state_dict()
        towers = {key: v for key, v in weights.items() if not key.startswith(_DECODER)}
        model.load_state_dict(towers)
        return model.eval()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Configuration, weights, image processor and tokenizer, for ``from_pretrained`` of
        transformers' Auto classes; :func:`vision_moe.save` writes them whole or not at all."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if not (args[0] if args else kwargs.get("is_main_process", True)):
            return
        description, preprocess = self.config.open_clip_config, self.config.preprocess
        assert description is not None and preprocess is not None
        image_size = description["vision_cfg"].get("image_size", 224)
        processor = json.dumps(image_processor_config(image_size, **preprocess), indent=2)
        (Path(save_directory) / "preprocessor_config.json").write_text(f"{processor}\n")
        # A tokenizer of the hub's keeps its name in the configuration, and is not needed to save.
        if not description["text_cfg"].get("hf_tokenizer_name") and is_causal(self.text):
            transformers_tokenizer(self.tokenizer.context_length).save_pretrained(save_directory)

    @cached_property
    def tokenizer(self) -> Any:
        """``tokenizer(texts)`` -> ``(B, context_length)`` int64, padded."""
        assert self.config.open_clip_config is not None
        return build_tokenizer(self.config.open_clip_config["text_cfg"])

    def trim_tokens(self, tokens: Tensor) -> Tensor:
        """Cut the columns that are padding in every text; the features stay the same.

        Args:
            tokens: ``(B, L)``.

        Returns:
            ``(B, L')``, L' the longest text; ``(B, L)`` where padding does count (a text tower
            whose attention is not causal).
        """
        if not is_causal(self.text) or not len(tokens):
            return tokens
        pad_id: Any = self.text.pad_id
        used = tokens.ne(pad_id).any(0).nonzero()
        return tokens[:, : int(used[-1]) + 1 if len(used) else 1]

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, P)``."""
        features = self.visual(pixel_values.to(self.dtype))
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_image_and_patches(self, pixel_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """:meth:`encode_image`, and its patch tokens' mean in the same space; see
        :func:`vision_moe.towers.image_and_patch_features`."""
        return image_and_patch_features(self.visual, pixel_values.to(self.dtype), layer)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """``(B, L)`` int64, L up to the context length -> ``(B, P)``."""
        features = self.text(tokens)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text_by_length(self, tokens: Tensor, num_groups: int = 4) -> Tensor:
        """:meth:`encode_text` in groups of like length, each without its common padding.

        A batch is as long as its longest text; captions of very different lengths, as the web
        writes them, cost a fraction of that. Router logits are those of the last group alone.

        Args:
            tokens: ``(B, L)`` int64.
            num_groups: how many groups of equal size.

        Returns:
            ``(B, P)``, in the order of ``tokens``.
        """
        pad_id: Any = getattr(self.text, "pad_id", 0)
        order = tokens.ne(pad_id).sum(1).argsort(stable=True)
        groups = [group for group in order.chunk(num_groups) if len(group)]
        features = [self.encode_text(self.trim_tokens(tokens[group])) for group in groups]
        return torch.cat(features)[order.argsort()]

    def forward(
        self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, **_kwargs: Any
    ) -> CLIPMoEOutput:
        """Encode images ``(B, 3, H, W)``, texts ``(B, L)``, or both, and keep the router logits."""
        with record_routing(self) as record:
            image_features = None if pixel_values is None else self.encode_image(pixel_values)
            text_features = None if input_ids is None else self.encode_text(input_ids)
        logits = None
        if image_features is not None and text_features is not None:
            normalize = nn.functional.normalize
            cosines = normalize(image_features, dim=-1) @ normalize(text_features, dim=-1).T
            logits = self.logit_scale.exp() * cosines
            logits = logits if self.logit_bias is None else logits + self.logit_bias
        return CLIPMoEOutput(
            image_features=image_features,
            text_features=text_features,
            logit_scale=self.logit_scale,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.T,
            router_logits=tuple(record.router_logits.values()),
        )

    def to_vision_model(self) -> CLIPMoEVisionModel:
        """The vision tower as a model of its own; the weights are shared, not copied."""
        with torch.device("meta"):
            tower = CLIPMoEVisionModel(self.config.vision_config)
        tower.visual = self.visual
        return tower.train(self.training)
