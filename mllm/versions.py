"""Versions and hardware: what a score or a time depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_LIBRARIES = ("mllm-moe", "torch", "transformers", "open_clip_torch", "peft", "numpy", "pillow")


def library_versions() -> dict[str, str]:
    """``{"python": ..., library: version}``; a library that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What a run computes on."""
    import joblib
    import psutil
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": joblib.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
