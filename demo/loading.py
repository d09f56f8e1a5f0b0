"""The models behind the page: MLLM folders, stock LLaVA, adapters on a base; CLIPs beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import vision_moe
from demo.options import DemoOptions
from mllm.chat import ChatModel
from mllm.model import load_mllm
from vision_moe import CLIPMoEModel, InputError

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Models:
    """What the tabs show.

    Attributes:
        chat: Answers; its name is ``chat_name``.
        compare: Answers beside it, if there is one.
        clips: Of the Zero-shot tab, by name.
    """

    chat: ChatModel
    chat_name: str
    compare: ChatModel | None = None
    compare_name: str = ""
    clips: dict[str, CLIPMoEModel] = field(default_factory=dict)


def load_models(options: DemoOptions) -> Models:
    """Load all that the options name, and the CLIPs that lie beside the checkpoint.

    Raises:
        InputError: Something named is missing or damaged.
    """
    compare = load_chat_model(options.compare, options) if options.compare else None
    return Models(
        chat=load_chat_model(options.checkpoint, options),
        chat_name=_short_name(options.checkpoint, options.compare),
        compare=compare,
        compare_name=_short_name(options.compare, options.checkpoint) if options.compare else "",
        clips=_load_clips(options),
    )


def load_chat_model(checkpoint: str, options: DemoOptions) -> ChatModel:
    """An MLLM, whatever it is stored as."""
    _check_device(options.device)
    folder = Path(checkpoint)
    if not (folder / _ADAPTER_CONFIG).is_file():
        return ChatModel(*load_mllm(checkpoint, device=options.device, load_in=options.load_in))
    base = options.base or _base_of(folder)
    model, processor = load_mllm(base, device=options.device, load_in=options.load_in)
    return ChatModel(_with_adapters(model, folder, merge=options.load_in is None), processor)


def _with_adapters(model: Any, folder: Path, merge: bool) -> Any:
    """``model`` with the adapters of ``folder``; beside weights of few bits they stay separate."""
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise InputError(f"'{folder}': {_ADAPTER_WEIGHTS} is missing; pickles are not read")
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # peft and safetensors raise whatever a strange file causes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"'{folder}': the adapters do not fit the base ({reason})") from error
    return (adapted.merge_and_unload() if merge else adapted.get_base_model()).eval()


def _base_of(folder: Path) -> str:
    file = folder / _ADAPTER_CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise InputError(f"'{file}' is damaged: {error}") from error
    if not isinstance(base, str) or not base:
        raise InputError(f"'{file}' names no base model; name it with --base")
    return base


def _check_device(device: str | None) -> None:
    available = {
        None: True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device]:
        raise InputError(f"--device {device}: this machine has none that PyTorch can use")


def _short_name(name: str, other: str | None) -> str:
    """The last part of a path, with the one before it where two would be called the same."""
    path = Path(name).resolve() if Path(name).exists() else Path(name)
    if other is not None and path.name == Path(other).name:
        return f"{path.parent.name}/{path.name}"
    return path.name


def _load_clips(options: DemoOptions) -> dict[str, CLIPMoEModel]:
    beside = Path(options.checkpoint).resolve().parent
    clips = {}
    for name, given, usual in (
        ("Dense CLIP", options.dense_clip, beside / "clip"),
        ("CLIP-MoE", options.clip, beside / "clip_moe"),
    ):
        if given is not None or (usual / "config.json").is_file():
            clips[name] = vision_moe.load(given or usual)
    return clips
