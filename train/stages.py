"""Resumable stages: a stage's folder appears whole, and is not made a second time.

A stage is known by its fingerprint, a hash of its name, its configuration and the fingerprints of
the stages before it, so that a change anywhere up the line is noticed here.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.processes import processes, written_by_main
from vision_moe import InputError, sha256_file

RECORD = "stage.json"


def checkpoint_folder(out: str | Path) -> Path:
    """Where the checkpoints of a run whose result goes to ``out`` stand, until it is whole."""
    return Path(f"{out}.checkpoints")


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Args:
        name: For the user's eyes, and part of the fingerprint.
        folder: Where the stage's files stand when it is whole.
        config: JSON-able; everything that changes the result, and nothing else (no paths).
        inputs: Fingerprints of what the stage reads.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    inputs: Sequence[str] = field(default_factory=tuple)

    @property
    def fingerprint(self) -> str:
        parts = {"name": self.name, "config": self.config, "inputs": list(self.inputs)}
        return hashlib.sha256(_canonical(parts).encode()).hexdigest()

    def record(self) -> dict[str, Any] | None:
        """What the folder's ``stage.json`` says; ``None`` where there is no such stage yet.

        Raises:
            InputError: Something else stands at the folder.
        """
        if not self.folder.exists():
            return None
        path = self.folder / RECORD
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["fingerprint"], content["seconds"]
        except (FileNotFoundError, NotADirectoryError):
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                return None
            raise InputError(
                f"{self.folder}: holds something other than the stage '{self.name}';"
                " choose another folder, or move it away"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged; delete {self.folder} to run it again") from error
        return content

    def check(self) -> bool:
        """Whether the folder holds this stage, whole.

        Raises:
            InputError: It holds the stage with another configuration, or something else.
        """
        record = self.record()
        if record is None:
            return False
        if record["fingerprint"] == self.fingerprint:
            return True
        raise InputError(
            f"{self.folder}: holds the stage '{record.get('name')}' with another configuration"
            f" ({self._difference(record)}); choose another folder, or delete this one"
        )

    def _difference(self, record: Mapping[str, Any]) -> str:
        old, new = _flat(record.get("config", {})), _flat(json.loads(_canonical(self.config)))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"'{key}' is {old.get(key)!r} there and {new.get(key)!r} now"
        return "what it was made from has changed"


@dataclass(frozen=True)
class StageResult:
    """``seconds``: what making the stage took, also where that was in an earlier run."""

    fingerprint: str
    seconds: float
    skipped: bool


def run(stage: Stage, make: Callable[[Path], None]) -> StageResult:
    """Make a stage unless it is there; of several processes, the main one's files are kept.

    Args:
        stage: What is to stand at ``stage.folder``.
        make: Fills the folder that it is given, which then gets its final name.
    """
    if stage.check():
        record = stage.record()
        assert record is not None
        _remove_checkpoints(stage)
        return StageResult(stage.fingerprint, float(record["seconds"]), skipped=True)
    processes().wait_for_everyone()  # all have looked before one writes
    started = time.monotonic()
    with written_by_main(stage.folder) as aside:
        make(aside)
        seconds = time.monotonic() - started
        record = {
            "name": stage.name,
            "fingerprint": stage.fingerprint,
            "seconds": round(seconds, 3),
            "config": stage.config,
            "inputs": list(stage.inputs),
        }
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _remove_checkpoints(stage)
    return StageResult(stage.fingerprint, seconds, skipped=False)


def _remove_checkpoints(stage: Stage) -> None:
    """They have served: the stage is whole."""
    if processes().is_main_process:
        shutil.rmtree(checkpoint_folder(stage.folder), ignore_errors=True)


def fingerprint_of(name_or_path: str | os.PathLike[str]) -> str:
    """Fingerprint of a model that a stage starts from.

    Args:
        name_or_path: A stage's folder, any other folder (its configuration and weights are
            hashed), or a name on a hub.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        return f"name:{os.fspath(name_or_path)}"
    if (path / RECORD).is_file():
        fingerprint = json.loads((path / RECORD).read_text(encoding="utf-8"))["fingerprint"]
        return f"stage:{fingerprint}"
    files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    return "files:" + _canonical({p.name: sha256_file(p) for p in files})


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``"""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, one in items:
        flat.update(_flat(one, f"{prefix}.{key}" if prefix else str(key)))
    return flat
