"""The user's cache folder: what is fetched or converted once and used by every run."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_dir() -> Path:
    """``$MLLM_CACHE``, or the platform's own cache folder; made when it is not there."""
    folder = Path(os.environ.get("MLLM_CACHE") or user_cache_dir("mllm-moe", appauthor=False))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
