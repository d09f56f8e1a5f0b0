"""The MLLM as a folder: written, read, and given another vision tower.

With LLaVA's own connector it is an ordinary ``LlavaForConditionalGeneration`` with an ordinary
``LlavaProcessor``; a stranger loads both with transformers (and ``import vision_moe``) alone. With
another connector ``import mllm`` is needed too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaProcessor,
    PreTrainedModel,
)

from mllm.building import build_llava, fit_processor, put_tower, upcycle_connector
from mllm.images import DEFAULT_GRID, ImageMode, image_processor_for
from mllm.modeling import ConnectorLlavaConfig
from mllm.tiles import is_tiled
from vision_moe import CLIPMoEVisionModel, InputError, atomic_directory, no_library_progress_bars

#: A LLaVA or LLaVA-NeXT model.
Llava = TypeVar("Llava", bound=PreTrainedModel)

__all__ = [
    "build_llava",
    "load_mllm",
    "replace_vision_tower",
    "save_mllm",
    "upcycle_connector",
]


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
    load_in: Literal["4bit", "8bit"] | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a LLaVA checkpoint: one of ours, or any other in the Hugging Face format.

    Args:
        name_or_path: A local folder, or a name on the model hub.
        dtype: Type of the weights.
        device: Where to put them; a GPU when there is one by default.
        load_in: Bits of the language model's linear layers (bitsandbytes); as stored by default.

    Raises:
        InputError: There is no such checkpoint, it is damaged, or it holds another kind of model.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists():
        raise InputError(f"'{folder}' is a file, not a checkpoint folder")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = _quantization(load_in, dtype, device) if load_in else {}
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if not isinstance(config, (LlavaConfig, LlavaNextConfig)):
            raise InputError(_not_llava(name_or_path, config.model_type))
        with no_library_progress_bars():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                name_or_path, dtype=dtype, output_loading_info=True, **options
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
    return model.eval() if load_in else model.eval().to(device), processor


def _quantization(load_in: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What ``from_pretrained`` takes: tower, connector and head stay as they are."""
    return {
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=load_in == "4bit",
            load_in_8bit=load_in == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        ),
    }


def _check_folder(folder: Path) -> None:
    config_file = folder / "config.json"
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise InputError(f"'{folder}' is not a checkpoint: it holds no config.json") from None
    except (ValueError, AttributeError) as error:
        raise InputError(f"'{config_file}' is damaged: {_first_line(error)}") from error
    if model_type not in ("llava", "llava_next", ConnectorLlavaConfig.model_type):
        raise InputError(_not_llava(folder, model_type))


def _not_llava(name: str | Path, model_type: str | None) -> str:
    return f"'{name}' holds a model of type '{model_type}', not an MLLM (type 'llava')"


def replace_vision_tower(
    model: Llava,
    folder: str | Path,
    processor: Any = None,
) -> Llava:
    """Give an existing LLaVA model another vision tower, in place; connector and LM stay.

    Args:
        model: Any LLaVA or LLaVA-NeXT checkpoint, from anywhere.
        folder: A CLIP-MoE folder (dense or MoE), or any folder or hub name of a vision model.
        processor: The model's processor; brought into line (picture size, patches) when given;
            pictures are padded, or cut in as many tiles, as before.

    Raises:
        InputError: The new tower's features do not fit the connector.
    """
    old_size = model.config.vision_config.image_size
    tower = load_vision_tower(folder)
    put_tower(model, tower, str(folder))
    size = tower.config.image_size
    grid: Any = DEFAULT_GRID
    if is_tiled(model):
        grid = [[side // old_size for side in sides] for sides in model.config.image_grid_pinpoints]
        pinpoints = [[number * size for number in numbers] for numbers in grid]
        model.config.image_grid_pinpoints = pinpoints
    if processor is not None:
        mode: ImageMode = "tiles" if is_tiled(model) else "square"
        if getattr(processor.image_processor, "do_pad", False) and not is_tiled(model):
            mode = "pad"
        shown = AutoImageProcessor.from_pretrained(folder)
        if mode != "square":
            shown = image_processor_for(shown, size, mode, grid)
        processor.image_processor = shown
        fit_processor(processor, model)
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
