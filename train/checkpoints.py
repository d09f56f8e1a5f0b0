"""Training checkpoints: what one holds, whether it is whole, and the weights in it.

    checkpoint-200/
      files.json              every other file with its size, written last
      trained.safetensors     what trains, and what else a step changes
      optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json

What is frozen is rebuilt from the recipe.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.sharding import spread_like
from vision_moe import InputError, atomic_write_text

logger = logging.getLogger(__name__)

MANIFEST, WEIGHTS = "files.json", "trained.safetensors"
UNFINISHED = "unfinished"
_FINGERPRINT = "fingerprint.json"


def write_manifest(folder: Path) -> None:
    """Record what belongs to a checkpoint that is complete."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    atomic_write_text(folder / MANIFEST, json.dumps(sizes, indent=2) + "\n")


def fault_of(checkpoint: Path) -> str | None:
    """What a checkpoint lacks; ``None`` of a whole one."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = dict(sizes).items()
    except OSError:
        return f"'{MANIFEST}' is missing"
    except (ValueError, TypeError):
        return f"'{MANIFEST}' is damaged"
    for name, size in files:
        try:
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"'{name}' has {found:,} bytes instead of {size:,}"
        except OSError:
            return f"'{name}' is missing"
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Newest first, whole or not."""
    numbered = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [numbered[step] for step in sorted(numbered, reverse=True)]


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; ``None`` where there are none at all.

    Raises:
        InputError: There are some, and none is whole.
    """
    found = checkpoints_in(folder)
    faults = []
    for checkpoint in found:
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is not whole and is passed over: %s", checkpoint, fault)
        faults.append(f"{checkpoint.name}: {fault}")
    if found:
        raise InputError(
            f"{folder}: no checkpoint is whole ({faults[0]}); restore the file, or set"
            " resume=never to start again"
        )
    return None


def prepare(folder: Path, fingerprint: str, resume: bool, will_save: bool) -> Path | None:
    """The checkpoint to go on from, in a folder that is then ready for this run's own.

    Raises:
        InputError: The checkpoints are of another run, or none is whole.
    """
    last = newest_whole(folder) if resume else None
    if last is not None:
        try:
            stored = json.loads((folder / _FINGERPRINT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = None
        if stored != fingerprint:
            raise InputError(
                f"{folder}: holds checkpoints of a run with another configuration;"
                " delete it, choose another 'out', or set resume=never"
            )
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        return last
    shutil.rmtree(folder, ignore_errors=True)
    if will_save:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
        atomic_write_text(folder / _FINGERPRINT, json.dumps(fingerprint))
    return None


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Name the checkpoint where its content turns out to be damaged."""
    try:
        yield
    except (
        OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError,
    ) as error:  # fmt: skip
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{checkpoint}: the checkpoint is damaged ({reason})") from error


class Content(Protocol):
    """What checkpoints hold of a model's weights."""

    def names(self) -> list[str]:
        """Of the parameters, in the model that trains."""

    def save(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write the parameters, by name."""

    def read(self, folder: Path) -> dict[str, Tensor]:
        """What :meth:`save` was given.

        Raises:
            InputError: A file is missing or damaged.
        """


class TrainedWeights:
    """What trains, in one file, with what else a step changes: buffers that are no constants."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def names(self) -> list[str]:
        trains = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return [*trains, *_persistent_buffers(self.model)]

    def save(self, state: Mapping[str, Tensor], folder: Path) -> None:
        save_file(on_cpu(state), folder / WEIGHTS, {"format": "pt"})

    def read(self, folder: Path) -> dict[str, Tensor]:
        with reading(folder):
            state: dict[str, Tensor] = load_file(folder / WEIGHTS)
        return state


def _persistent_buffers(model: nn.Module) -> list[str]:
    stored = model.state_dict(keep_vars=True).keys()
    return [name for name, _ in model.named_buffers() if name in stored]


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def put_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into the parameters or buffers of the same names; ``source`` is named in errors.

    Raises:
        InputError: A name or a shape does not fit.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in state.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise InputError(f"{source}: a checkpoint of another model ('{name}' does not fit)")
        tensors[name].copy_(spread_like(tensors[name], value))
