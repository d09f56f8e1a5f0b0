"""Versions of everything that a score depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

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
