"""Loading a local folder takes a second: transformers' own progress bars are left out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_library_progress_bars() -> Iterator[None]:
    """Turn transformers' progress bars off while the block lasts."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
