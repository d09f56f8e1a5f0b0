"""Putting an MLLM together: vision tower, connector, language model, and the processor for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.chat_template import IMAGE_TOKEN, multimodal_chat_template
from mllm.connectors import STOCK, MoEMLP, num_output_tokens, upcycled_experts
from mllm.mapped_files import release_file_pages
from mllm.modeling import (
    ConnectorLlavaConfig,
    ConnectorLlavaForConditionalGeneration,
    connector_of,
)
from vision_moe import InputError


def build_llava(
    language_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    vision_tower: PreTrainedModel,
    image_processor: Any,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    seed: int = 0,
    connector: Mapping[str, Any] | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a causal LM and a vision tower by a new connector, LLaVA's two-layer MLP by default.

    The parts are taken over, not copied: the language model's embeddings grow by the image token,
    and the tokenizer learns it.

    Args:
        language_model: A causal LM (``.model``-style base and an output head).
        tokenizer: Its tokenizer, with a chat template.
        vision_tower: Any Hugging Face vision model that returns ``hidden_states``.
        image_processor: Makes the tower's ``pixel_values``.
        vision_feature_layer: Whose hidden states the connector reads; -2 is LLaVA's.
        vision_feature_select_strategy: ``default`` drops the first token (CLS), ``full`` keeps all.
        seed: Of the connector's initial weights.
        connector: ``{"name": ...}`` and options, see :mod:`mllm.connectors`. With any other than
            ``mlp2x_gelu`` the model is one that only this toolkit's class reads.

    Raises:
        InputError: There is no such connector, or it does not fit the tower.
    """
    tokenizer.add_tokens(
        [AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True
    )
    tokenizer.padding_side = "left"
    _grow_vocabulary(language_model, len(tokenizer))

    num_patches, num_other_tokens = count_tokens(vision_tower, vision_feature_layer)
    drops_first = vision_feature_select_strategy == "default"
    num_tokens = num_patches + num_other_tokens - drops_first
    described: dict[str, Any] = {
        "vision_config": vision_tower.config,
        "text_config": language_model.config,
        "image_token_index": tokenizer.added_tokens_encoder[IMAGE_TOKEN],
        "image_seq_length": num_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": vision_feature_select_strategy,
        "tie_word_embeddings": language_model.config.tie_word_embeddings,
    }
    config: LlavaConfig = (
        LlavaConfig(**described)
        if is_stock(connector)
        else ConnectorLlavaConfig(
            connector=dict(connector or {}), num_tower_tokens=num_tokens, **described
        )
    )
    config.pad_token_id = tokenizer.pad_token_id
    projector = _new_projector(config, seed)
    config.image_seq_length = num_output_tokens(projector, num_tokens)
    model = _assemble(
        config,
        vision_tower,
        projector.to(language_model.device, language_model.dtype),
        language_model.get_decoder(),
        language_model.get_output_embeddings(),
    )
    model.generation_config = language_model.generation_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=multimodal_chat_template(tokenizer.chat_template),
    )
    fit_processor(processor, model)
    return model, processor


def is_stock(connector: Mapping[str, Any] | None) -> bool:
    """Whether the stock class has that connector."""
    return connector is None or dict(connector) in ({}, {"name": STOCK})


def _assemble(
    config: LlavaConfig, vision_tower: Any, projector: nn.Module, language_model: Any, head: Any
) -> LlavaForConditionalGeneration:
    """A model of the class that the configuration is for, made of parts that exist."""
    is_ours = isinstance(config, ConnectorLlavaConfig)
    model_class: Any = (
        ConnectorLlavaForConditionalGeneration if is_ours else LlavaForConditionalGeneration
    )
    with torch.device("meta"):  # the parts exist: a second copy of their weights is not needed
        model: LlavaForConditionalGeneration = model_class(config)
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model
    model.lm_head = head
    model.model.multi_modal_projector = projector
    return model.eval()


def put_tower(model: Any, tower: PreTrainedModel, name: str) -> None:
    """Give a model another vision tower, in place; connector and language model stay.

    Raises:
        InputError: The tower's features do not fit the connector; ``name`` is the tower's.
    """
    config = model.config
    layers = config.vision_feature_layer
    num_layers = 1 if isinstance(layers, int) else len(layers)
    old: Any = config.vision_config
    if tower.config.hidden_size != old.hidden_size:
        raise InputError(
            f"'{name}': its features are {tower.config.hidden_size * num_layers} wide, and the"
            f" model's connector takes {old.hidden_size * num_layers}"
        )
    num_patches, num_other_tokens = count_tokens(
        tower, layers if isinstance(layers, int) else layers[-1]
    )
    drops_first = config.vision_feature_select_strategy == "default"
    num_tokens = num_patches + num_other_tokens - drops_first
    if not isinstance(config, ConnectorLlavaConfig):
        config.image_seq_length = num_tokens
    elif num_tokens != config.num_tower_tokens:
        connector = model.model.multi_modal_projector
        if not connector.any_length:
            raise InputError(
                f"'{name}': it gives {num_tokens} tokens, and the model's connector is made"
                f" for {config.num_tower_tokens}"
            )
        connector.num_output_tokens = config.num_tower_tokens = num_tokens
        config.image_seq_length = num_tokens
    config.vision_config = tower.config
    weight = next(model.model.vision_tower.parameters())
    is_training = model.model.vision_tower.training
    model.model.vision_tower = tower.to(weight.device, weight.dtype).train(is_training)


def fit_processor(processor: Any, model: Any) -> None:
    """Tell the processor how many placeholders a picture has.

    The stock processor counts patches and what is beside them. Where the connector changes their
    number, the whole picture is one patch to it, and the rest of the tokens stand beside it.
    """
    config = model.config
    vision: Any = config.vision_config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(config, ConnectorLlavaConfig):
        processor.patch_size = min(height, width)
        num_patches = (height // processor.patch_size) * (width // processor.patch_size)
        processor.num_additional_image_tokens = config.image_seq_length - num_patches
        processor.vision_feature_select_strategy = "full"
    else:
        drops_first = config.vision_feature_select_strategy == "default"
        num_patches = (height // vision.patch_size) * (width // vision.patch_size)
        processor.patch_size = vision.patch_size
        processor.num_additional_image_tokens = config.image_seq_length + drops_first - num_patches
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy


def correct_token_count(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> tuple[int, int]:
    """Bring configuration and processor into line with what tower and connector give.

    Checkpoints from elsewhere often state another number of image tokens than they compute.

    Returns:
        The number that was stated, and the one that is computed.
    """
    config = model.config
    layers = config.vision_feature_layer
    layer = layers if isinstance(layers, int) else layers[-1]
    num_tokens = sum(count_tokens(model.model.vision_tower, layer))
    num_tokens -= config.vision_feature_select_strategy == "default"
    computed = num_output_tokens(model.model.multi_modal_projector, num_tokens)
    stated = config.image_seq_length
    if stated != computed:
        config.image_seq_length = computed
        fit_processor(processor, model)
    return stated, computed


def upcycle_connector(
    model: LlavaForConditionalGeneration,
    num_experts: int = 4,
    top_k: int = 2,
    seed: int = 0,
) -> ConnectorLlavaForConditionalGeneration:
    """Turn a trained MLP connector into a mixture of copies of it (CuMo, arXiv 2405.05949).

    At the start the result computes what ``model`` does; ``model``'s other parts are taken over.

    Args:
        model: With an ``mlpNx_gelu`` connector, stock or ours.
        num_experts: E.
        top_k: K.
        seed: Of the router.

    Raises:
        InputError: Its connector is no MLP, or ``top_k`` is larger than ``num_experts``.
    """
    projector = model.model.multi_modal_projector
    num_layers = sum(isinstance(module, nn.Linear) for module in projector.children())
    is_mlp = num_layers and all(name.startswith(("linear_", "act")) for name, _ in
                                projector.named_children())  # fmt: skip
    if not is_mlp:
        raise InputError("the connector is no MLP, so that it cannot be upcycled to experts")
    values = model.config.to_dict()
    for key in ("model_type", "connector", "num_tower_tokens", "architectures"):
        values.pop(key, None)
    values |= {"vision_config": model.config.vision_config, "text_config": model.config.text_config}
    config = ConnectorLlavaConfig(
        connector={
            "name": "moe_mlp",
            "num_experts": num_experts,
            "top_k": top_k,
            "num_layers": num_layers,
        },
        num_tower_tokens=model.config.image_seq_length,
        **values,
    )
    new = _new_projector(config, seed)
    assert isinstance(new, MoEMLP)
    weight = next(projector.parameters())
    upcycled_experts(projector, new.to(weight.device, weight.dtype))
    upcycled = _assemble(
        config, model.model.vision_tower, new, model.model.language_model, model.lm_head
    )
    upcycled.generation_config = model.generation_config
    assert isinstance(upcycled, ConnectorLlavaForConditionalGeneration)
    return upcycled


def with_connector(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    connector: Mapping[str, Any],
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """``model`` with the connector that is asked for: its own, or its MLP upcycled to experts.

    Raises:
        InputError: It is another connector, which would have to be trained anew.
    """
    stock = {"name": STOCK}
    own = model.config.connector if isinstance(model.config, ConnectorLlavaConfig) else stock
    wanted = dict(connector)
    if wanted == own:
        return model
    if wanted.pop("name", None) != "moe_mlp" or (own or {}).get("name") == "moe_mlp":
        raise InputError(f"the model's connector is {own}; it cannot become {dict(connector)}")
    num_layers = wanted.pop("num_layers", None)
    unknown = wanted.keys() - {"num_experts", "top_k"}
    if unknown:
        raise InputError(f"connector 'moe_mlp' has no option '{sorted(unknown)[0]}'")
    upcycled = upcycle_connector(model, seed=seed, **wanted)
    assert upcycled.config.connector is not None
    if num_layers not in (None, upcycled.config.connector["num_layers"]):
        raise InputError(f"the model's connector has no {num_layers} layers to be upcycled")
    fit_processor(processor, upcycled)
    return upcycled


def _grow_vocabulary(language_model: Any, size: int) -> None:
    """Append rows for new tokens at the mean of the others, where they attract nothing."""
    old_size = language_model.get_input_embeddings().num_embeddings
    if size <= old_size:
        return
    old = language_model.get_input_embeddings().weight.detach()
    language_model.resize_token_embeddings(size, mean_resizing=False)
    release_file_pages([old])  # the file stays mapped for the sake of the other weights
    tables = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    with torch.no_grad():
        for table in tables:
            weight: Tensor = table.weight
            weight[old_size:] = weight[:old_size].mean(0)


def _new_projector(config: LlavaConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not isinstance(config, ConnectorLlavaConfig):
            return LlavaMultiModalProjector(config)
        try:
            connector: nn.Module = connector_of(config)
        except ValueError as error:
            raise InputError(str(error)) from error
        return connector


@torch.no_grad()
def count_tokens(vision_tower: Any, vision_feature_layer: int) -> tuple[int, int]:
    """Number of patch tokens, and of others (CLS), measured on one blank picture."""
    config = vision_tower.config
    weight = next(vision_tower.parameters())
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    blank = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
    states = vision_tower(blank, output_hidden_states=True).hidden_states
    num_patches = (height // config.patch_size) * (width // config.patch_size)
    return num_patches, states[vision_feature_layer].shape[1] - num_patches
