"""Several processes of one run, as ``accelerate launch`` or ``torchrun`` start them.

One process runs as if there were nothing here.  Of several, the main one alone writes what stays;
all read it, so the folder must be one that all of them see.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from vision_moe import atomic_directory

#: Others wait for the main process while it clusters the features of all pairs.
TIMEOUT = timedelta(hours=6)


def processes() -> PartialState:
    """This process among those of the run: ``process_index``, ``num_processes``,
    ``is_main_process``, ``wait_for_everyone()``."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    options = {"timeout": TIMEOUT} if several and not PartialState._shared_state else {}
    return PartialState(cpu=not _has_accelerator(), **options)


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


@contextmanager
def written_by_main(folder: Path) -> Iterator[Path]:
    """:func:`vision_moe.atomic_directory` for the main process.

    What the others write goes to a folder of their own that is then removed; they leave the block
    when ``folder`` stands.
    """
    state = processes()
    if state.is_main_process:
        with atomic_directory(folder) as aside:
            yield aside
        state.wait_for_everyone()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        state.wait_for_everyone()
