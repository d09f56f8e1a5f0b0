"""Arrays of one shape by name, in a folder that several processes may add to at once.

    1f0c….names       one line of 32 hexadecimal digits for each array
    1f0c….features    the arrays in the same order, nothing between them

A process appends to a pair of files of its own, arrays first: whoever opens the folder beside it,
or after it was killed, sees whole arrays only.
"""

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_DIGITS = 32
_LINE = _DIGITS + 1


class FeatureFiles:
    """What a folder holds; of what others add from now on, nothing.

    Args:
        folder: Made if it is not there.
        shape: Of each array.
        dtype: Of each array.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: str) -> None:
        self._folder = folder
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._num_bytes = int(np.prod(shape)) * self._dtype.itemsize
        self._places: dict[str, tuple[Path, int]] = {}
        self._maps: dict[Path, np.ndarray] = {}
        self._own: Path | None = None
        self._num_own = 0
        folder.mkdir(parents=True, exist_ok=True)
        for names_file in sorted(folder.glob("*.names")):
            file = names_file.with_suffix(".features")
            lines = names_file.read_text(encoding="ascii", errors="replace")
            num_whole = file.stat().st_size // self._num_bytes if file.is_file() else 0
            for number in range(min(len(lines) // _LINE, num_whole)):
                self._places[lines[number * _LINE :][:_DIGITS]] = file, number

    @staticmethod
    def name(identity: str) -> str:
        """The name that stands for any text."""
        return hashlib.sha256(identity.encode()).hexdigest()[:_DIGITS]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> np.ndarray:
        """An array, memory-mapped for reading."""
        file, number = self._places[name]
        if number >= len(self._maps.get(file, ())):
            num_whole = file.stat().st_size // self._num_bytes
            self._maps[file] = np.memmap(file, self._dtype, "r", 0, (num_whole, *self._shape))
        array: np.ndarray = self._maps[file][number]
        return array

    def add(self, names: Sequence[str], arrays: np.ndarray) -> None:
        """Keep ``arrays``, one for each name.

        Raises:
            OSError: They cannot be written; what this process adds later could not be found.
        """
        assert arrays.shape == (len(names), *self._shape)
        if self._own is None:
            self._own = self._folder / f"{uuid.uuid4().hex}.features"
        with self._own.open("ab") as file:
            file.write(arrays.astype(self._dtype).tobytes())
        with self._own.with_suffix(".names").open("a", encoding="ascii") as names_file:
            names_file.writelines(f"{name}\n" for name in names)
        for name in names:
            self._places[name] = self._own, self._num_own
            self._num_own += 1
