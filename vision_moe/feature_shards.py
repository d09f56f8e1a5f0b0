"""Features of all pairs on disk: shards of fp16, memory-mapped, each whole or not there.

A shard is known by its number alone, whatever the number of processes that write them, so that a
run that was broken off encodes what is missing, with as many processes as it then has.  Features
that come by and by, in any order, are put where their rows belong until their shard is written.

M pairs, D feature width, R rows of a shard.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vision_moe.errors import InputError
from vision_moe.files import atomic_write_bytes, atomic_write_text

_MAX_ROWS, _MIN_ROWS, _MANY = 65_536, 256, 64


class FeatureShards:
    """L2-normalised image and text features of M pairs below a folder.

    Args:
        folder: Is made by the first shard.
        num_pairs: M.
        sample: Numbers of the pairs, ascending, where they are M of more; 0 to M - 1 by default.
    """

    def __init__(self, folder: Path, num_pairs: int, sample: np.ndarray | None = None) -> None:
        assert sample is None or len(sample) == num_pairs
        self.folder = folder
        self.sample = sample
        self.num_pairs = num_pairs
        # Many shards even of few pairs: each is the work of one process.
        self.rows = min(_MAX_ROWS, max(_MIN_ROWS, -(-num_pairs // _MANY)))
        self.num_shards = -(-num_pairs // self.rows)
        self._open: dict[tuple[str, int], np.ndarray] = {}

    def numbers(self, shard: int) -> np.ndarray:
        """Of the pairs in a shard."""
        rows = np.arange(shard * self.rows, min((shard + 1) * self.rows, self.num_pairs))
        return rows if self.sample is None else self.sample[rows]

    def is_whole(self, shard: int) -> bool:
        return self._skipped_file(shard).is_file()

    def put(self, numbers: np.ndarray, image: np.ndarray, text: np.ndarray) -> None:
        """Keep features of some pairs, in any order, until their shards are written.

        Of one process's, and not of a sample; what is put again replaces what was.

        Args:
            numbers: ``(n,)``, of the pairs.
            image: ``(n, D)``, of any norm.
            text: ``(n, D)``.
        """
        assert self.sample is None
        order = numbers.argsort(kind="stable")
        shard, row = np.divmod(numbers[order], self.rows)
        shards, starts = np.unique(shard, return_index=True)
        bounds = [*starts.tolist(), len(numbers)]
        parts = [*zip(shards.tolist(), bounds[:-1], bounds[1:], strict=True)]
        for name, features in (("image", image), ("text", text)):
            unit = _unit(features[order]).astype(np.float16)
            for number, start, end in parts:
                self._kept(name, number, unit.shape[1])[row[start:end]] = unit[start:end]

    def kept(self, shard: int) -> tuple[np.ndarray, np.ndarray] | None:
        """What has been put of a shard: image and text features ``(R, D)``, zeros where nothing
        has; ``None`` if nothing has anywhere in it."""
        files = [self._kept_file(name, shard) for name in ("image", "text")]
        if not all(file.is_file() for file in files):
            return None
        image, text = (np.fromfile(file, np.float16) for file in files)
        rows = len(self.numbers(shard))
        return image.reshape(rows, -1), text.reshape(rows, -1)

    def write(
        self, shard: int, image: np.ndarray, text: np.ndarray, skipped: Mapping[int, str]
    ) -> None:
        """Write a shard.

        Args:
            shard: Its number.
            image: ``(R, D)``, of any norm; a row of zeros stands for a pair that is skipped.
            text: ``(R, D)``.
            skipped: Why each of those is, by the pair's number.

        Raises:
            InputError: A feature is not a number, or the shard cannot be written.
        """
        for name, features in (("image", image), ("text", text)):
            assert len(features) == len(self.numbers(shard))
            if not np.isfinite(features).all():
                row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
                raise InputError(
                    f"the {name} feature of pair {self.numbers(shard)[row]} is not a number"
                )
            content = io.BytesIO()
            np.save(content, _unit(features).astype(np.float16))
            atomic_write_bytes(self._file(name, shard), content.getvalue())
        # Last: it says that the shard is whole.
        reasons = {str(number): reason for number, reason in skipped.items()}
        atomic_write_text(self._skipped_file(shard), json.dumps(reasons))
        for name in ("image", "text"):
            self._open.pop((name, shard), None)
            self._kept_file(name, shard).unlink(missing_ok=True)

    @property
    def image(self) -> MappedRows:
        """``(M, D)`` fp16."""
        return self._rows("image")

    @property
    def text(self) -> MappedRows:
        """``(M, D)`` fp16."""
        return self._rows("text")

    def skipped(self) -> dict[int, str]:
        """The pairs that are left out, and why."""
        reasons: dict[int, str] = {}
        for shard in range(self.num_shards):
            content = json.loads(self._skipped_file(shard).read_text(encoding="utf-8"))
            reasons.update({int(number): reason for number, reason in content.items()})
        return reasons

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _rows(self, name: str) -> MappedRows:
        files = [self._file(name, shard) for shard in range(self.num_shards)]
        return MappedRows([np.load(file, mmap_mode="r") for file in files], self.rows)

    def _kept(self, name: str, shard: int, width: int) -> np.ndarray:
        """``(R, D)``, memory-mapped for writing."""
        if (name, shard) not in self._open:
            file = self._kept_file(name, shard)
            shape = len(self.numbers(shard)), width
            whole = file.is_file() and file.stat().st_size == 2 * shape[0] * shape[1]
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                rows = np.memmap(file, np.float16, "r+" if whole else "w+", shape=shape)
            except OSError as error:
                reason = error.strerror or error
                raise InputError(f"{file}: cannot be written ({reason})") from error
            self._open[name, shard] = np.asarray(rows)  # still mapped, and faster to index
        return self._open[name, shard]

    def _kept_file(self, name: str, shard: int) -> Path:
        return self.folder / f"kept-{name}-{shard:05d}.raw"

    def _file(self, name: str, shard: int) -> Path:
        return self.folder / f"{name}-{shard:05d}.npy"

    def _skipped_file(self, shard: int) -> Path:
        return self.folder / f"skipped-{shard:05d}.json"


class MappedRows:
    """Rows of several memory-mapped arrays in one numbering.

    Args:
        shards: ``(R, D)`` each, the last one may be shorter.
        rows: R.
    """

    def __init__(self, shards: list[np.ndarray], rows: int) -> None:
        self.shards = shards
        self.rows = rows
        self.shape = (sum(len(one) for one in shards), shards[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """``(n, D)``: the rows of ascending ``numbers``."""
        shard = numbers // self.rows
        starts = np.flatnonzero(np.diff(shard, prepend=-1))
        parts = [
            self.shards[part[0] // self.rows][part % self.rows]
            for part in np.split(numbers, starts[1:])
            if len(part)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), np.float16)


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of norm 1, in fp32: a row of zeros stays one, which in fp16 would be divided by 0."""
    features = features.astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
