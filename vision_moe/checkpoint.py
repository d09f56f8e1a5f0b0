"""CLIP-MoE folders: config.json, model.safetensors, preprocessor_config.json, tokenizer files.

The tokenizer is open_clip's, described by ``open_clip_config.text_cfg`` in config.json; the files
are for transformers. Weights are safetensors, never pickles.
"""

import json
import os
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open

from vision_moe.configuration import CLIPMoEConfig, CLIPMoEVisionConfig
from vision_moe.errors import InputError
from vision_moe.files import atomic_directory
from vision_moe.modeling import CLIPMoEModel
from vision_moe.quiet import no_library_progress_bars

WEIGHTS = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load(folder: str | os.PathLike[str]) -> CLIPMoEModel:
    """Read a CLIP, dense or MoE, with both towers, in evaluation mode.

    Raises:
        InputError: the folder is missing, damaged, or not one of ours.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        model = empty_model(config)
    except Exception as error:
        path = folder / "config.json"
        raise InputError(f"{path}: no model can be built from it ({error})") from error
    _check_weights(folder, {k: tuple(v.shape) for k, v in model.state_dict().items()})
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        # Copied out of the mapped file, where they lie unaligned: kernels would round differently
        # from the model that was saved.
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(state, assign=True)
    model.config.dtype = model.dtype
    return model.eval()


def empty_model(config: CLIPMoEConfig) -> CLIPMoEModel:
    """A model whose weights are on the meta device, for ``load_state_dict(..., assign=True)``;
    buffers that no checkpoint holds have their values."""
    with torch.random.fork_rng(devices=[]):
        try:
            with init_empty_weights(include_buffers=False):
                return CLIPMoEModel(config)
        except RuntimeError:
            # timm's hybrids run a picture through themselves as they are built.
            return CLIPMoEModel(config)


def save(model: CLIPMoEModel, folder: str | os.PathLike[str]) -> None:
    """Write a model, whole or not at all; an existing folder of that name is replaced."""
    with atomic_directory(folder) as aside, no_library_progress_bars():
        try:
            # One file, whatever its size: `load` reads no index.
            model.save_pretrained(aside, max_shard_size="1000GB")
        except SafetensorError as error:
            raise InputError(f"{folder}: the weights cannot be written ({error})") from error


def read_config(folder: str | os.PathLike[str]) -> CLIPMoEConfig:
    """The configuration of a folder of ours.

    Raises:
        InputError: the folder is missing, or not one of ours.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not a CLIP-MoE folder, it has no config.json") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type == CLIPMoEVisionConfig.model_type:
        raise InputError(
            f"{folder}: holds a vision tower alone; CLIPMoEVisionModel.from_pretrained reads it"
        )
    if model_type != CLIPMoEConfig.model_type:
        raise InputError(f"{path}: model_type is {model_type!r}, not {CLIPMoEConfig.model_type!r}")
    try:
        return CLIPMoEConfig.from_dict(content)
    except Exception as error:
        raise InputError(f"{path}: {error}") from error


def _check_weights(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
        found = f", and {pickles[0]} is a pickle, which is not read" if pickles else ""
        raise InputError(f"{folder}: {WEIGHTS} is missing{found}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from error
    for key in sorted(expected.keys() - stored.keys()):
        raise InputError(f"{path}: {key} is missing")
    for key in sorted(stored.keys() - expected.keys()):
        raise InputError(f"{path}: {key} does not belong to the model in config.json")
    for key, shape in expected.items():
        if stored[key] != shape:
            raise InputError(f"{path}: {key} has shape {stored[key]}, config.json says {shape}")
