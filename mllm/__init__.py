"""MLLMs on a CLIP-MoE tower: connector, prompts, chat, scoring, evaluation, command line.

Names resolve on first use (PEP 562), so that ``import mllm`` and ``mllm --help`` load no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mllm.registration import register_with_transformers

if TYPE_CHECKING:
    from mllm import scoring
    from mllm.model import (
        build_llava,
        load_mllm,
        replace_vision_tower,
        save_mllm,
        upcycle_connector,
    )

__all__ = [
    "build_llava",
    "load_mllm",
    "replace_vision_tower",
    "save_mllm",
    "scoring",
    "upcycle_connector",
]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name == "scoring":
        return import_module("mllm.scoring")
    if name in __all__:
        return getattr(import_module("mllm.model"), name)
    raise AttributeError(f"module 'mllm' has no attribute {name!r}")
