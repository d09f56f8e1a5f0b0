"""The MLLM: vision tower, MLP connector and language model in the stock LLaVA class.

What is built here is an ordinary ``LlavaForConditionalGeneration`` with an ordinary
``LlavaProcessor``; a stranger loads both with transformers (and ``import vision_moe``) alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.chat_template import IMAGE_TOKEN, multimodal_chat_template
from vision_moe import CLIPMoEVisionModel, InputError, atomic_directory, no_library_progress_bars


def build_llava(
    language_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    vision_tower: PreTrainedModel,
    image_processor: Any,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a causal LM and a vision tower by a new two-layer MLP connector.

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
    """
    tokenizer.add_tokens(
        [AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True
    )
    tokenizer.padding_side = "left"
    _grow_vocabulary(language_model, len(tokenizer))

    num_patches, num_other_tokens = _count_tokens(vision_tower, vision_feature_layer)
    drops_first = vision_feature_select_strategy == "default"
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.added_tokens_encoder[IMAGE_TOKEN],
        image_seq_length=num_patches + num_other_tokens - drops_first,
        projector_hidden_act="gelu",
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):  # the parts exist: a second copy of their weights is not needed
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.get_decoder()
    model.lm_head = language_model.get_output_embeddings()
    model.model.multi_modal_projector = _new_projector(config, seed).to(
        language_model.device, language_model.dtype
    )
    model.generation_config = language_model.generation_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.eval()

    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision_tower.config.patch_size,
        vision_feature_select_strategy=vision_feature_select_strategy,
        chat_template=multimodal_chat_template(tokenizer.chat_template),
        num_additional_image_tokens=num_other_tokens,
    )
    return model, processor


def _grow_vocabulary(language_model: Any, size: int) -> None:
    """Append rows for new tokens at the mean of the others, where they attract nothing."""
    old_size = language_model.get_input_embeddings().num_embeddings
    if size <= old_size:
        return
    language_model.resize_token_embeddings(size, mean_resizing=False)
    tables = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    with torch.no_grad():
        for table in tables:
            weight: Tensor = table.weight
            weight[old_size:] = weight[:old_size].mean(0)


def _new_projector(config: LlavaConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaMultiModalProjector(config)


@torch.no_grad()
def _count_tokens(vision_tower: Any, vision_feature_layer: int) -> tuple[int, int]:
    """Number of patch tokens, and of others (CLS), measured on one blank picture."""
    config = vision_tower.config
    weight = next(vision_tower.parameters())
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    blank = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
    states = vision_tower(blank, output_hidden_states=True).hidden_states
    num_patches = (height // config.patch_size) * (width // config.patch_size)
    return num_patches, states[vision_feature_layer].shape[1] - num_patches


def save_mllm(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path
) -> None:
    """Write model and processor to ``folder``, which appears whole or not at all."""
    try:
        with atomic_directory(folder) as aside, no_library_progress_bars():
            model.save_pretrained(aside)
            processor.save_pretrained(aside)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise InputError(f"'{folder}' cannot be written ({_first_line(error)})") from error


def load_mllm(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a LLaVA checkpoint: one of ours, or any other in the Hugging Face format.

    Args:
        name_or_path: A local folder, or a name on the model hub.
        dtype: Type of the weights.
        device: Where to put them; a GPU when there is one by default.

    Raises:
        InputError: There is no such checkpoint, it is damaged, or it holds another kind of model.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists():
        raise InputError(f"'{folder}' is a file, not a checkpoint folder")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if not isinstance(config, LlavaConfig):
            raise InputError(_not_llava(name_or_path, config.model_type))
        with no_library_progress_bars():
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                name_or_path, dtype=dtype, output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(name_or_path)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if folder.is_dir():
            reason = f"the checkpoint is damaged ({_first_line(error)})"
        else:
            reason = "there is no such folder, and no such model on the hub"
        raise InputError(f"'{name_or_path}': {reason}") from error
    model, loading = loaded
    absent = sorted(loading["missing_keys"])
    if absent:
        raise InputError(
            f"'{name_or_path}': the checkpoint is damaged, {len(absent)} weights are missing,"
            f" '{absent[0]}' for one"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), processor


def _check_folder(folder: Path) -> None:
    config_file = folder / "config.json"
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise InputError(f"'{folder}' is not a checkpoint: it holds no config.json") from None
    except (ValueError, AttributeError) as error:
        raise InputError(f"'{config_file}' is damaged: {_first_line(error)}") from error
    if model_type != "llava":
        raise InputError(_not_llava(folder, model_type))


def _not_llava(name: str | Path, model_type: str | None) -> str:
    return f"'{name}' holds a model of type '{model_type}', not an MLLM (type 'llava')"


def replace_vision_tower(
    model: LlavaForConditionalGeneration,
    folder: str | Path,
    processor: LlavaProcessor | None = None,
) -> LlavaForConditionalGeneration:
    """Give an existing LLaVA model another vision tower, in place; connector and LM stay.

    Args:
        model: Any LLaVA checkpoint, from anywhere.
        folder: A CLIP-MoE folder (dense or MoE), or any folder or hub name of a vision model.
        processor: The model's processor; brought into line (picture size, patches) when given.

    Raises:
        InputError: The new tower's features do not fit the connector.
    """
    tower = load_vision_tower(folder)
    old = model.model.vision_tower
    connector_width = model.model.multi_modal_projector.linear_1.in_features
    layers = model.config.vision_feature_layer
    width = tower.config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    if width != connector_width:
        raise InputError(
            f"'{folder}': its features are {width} wide, and the model's connector takes"
            f" {connector_width}"
        )
    weight = next(old.parameters())
    model.model.vision_tower = tower.to(weight.device, weight.dtype).train(old.training)
    model.config.vision_config = tower.config
    layer = layers if isinstance(layers, int) else layers[-1]
    num_patches, num_other_tokens = _count_tokens(tower, layer)
    drops_first = model.config.vision_feature_select_strategy == "default"
    model.config.image_seq_length = num_patches + num_other_tokens - drops_first
    if processor is not None:
        processor.image_processor = AutoImageProcessor.from_pretrained(folder)
        processor.patch_size = tower.config.patch_size
        processor.num_additional_image_tokens = num_other_tokens
    return model


def load_vision_tower(folder: str | Path) -> PreTrainedModel:
    """A vision tower from a CLIP-MoE folder (dense or MoE), or any folder or hub name of one.

    Raises:
        InputError: There is none.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with no_library_progress_bars():
            if config.model_type.startswith("clip_moe"):
                return CLIPMoEVisionModel.from_pretrained(folder)
            if config.model_type == "clip":  # both towers in one folder: the vision half
                from transformers import CLIPVisionModel

                return CLIPVisionModel.from_pretrained(folder)
            return AutoModel.from_pretrained(folder)
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"'{folder}': no vision tower can be loaded from it ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
