"""Weights that lie in a mapped file: their memory can be handed back, the file still has them."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor, nn

# <sys/mman.h>, and what Linux says of a page in /proc/PID/pagemap
_MADV_DONTNEED = 4
_OF_FILE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))


def release_file_pages(tensors: Iterable[Tensor]) -> int:
    """Hand back the memory of tensors that a file holds unchanged; bytes.

    They stay what they are: what is used again is read from the file. Of tensors whose memory is
    their own, or that have been changed, nothing is handed back; nor where the system is not Linux.
    """
    if sys.platform != "linux":
        return 0
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        return 0
    try:
        return sum(_release(tensor, pagemap) for tensor in tensors)
    finally:
        os.close(pagemap)


def holds_fp32(folder: Path) -> bool:
    """Whether a checkpoint is mapped as it is when it is loaded in fp32."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            if any(tensors.get_slice(name).get_dtype() != "F32" for name in names):
                return False
    return bool(files)


def _release(tensor: Tensor, pagemap: int) -> int:
    """Whole pages only: those at the ends may be another's, too."""
    is_plain = type(tensor) in (Tensor, nn.Parameter)  # a stand-in for one has no memory
    if not is_plain or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return 0
    start = tensor.data_ptr()
    first = -(-start // mmap.PAGESIZE)
    count = (start + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE - first
    if count <= 0:
        return 0
    pages = np.frombuffer(os.pread(pagemap, 8 * count, 8 * first), np.uint64)
    present = (pages & _PRESENT) != 0
    # A page that was written to is no file's any more, and its content is nowhere else.
    if len(pages) != count or ((pages & _SWAPPED) != 0).any() or not _all_of_file(pages[present]):
        return 0
    libc = ctypes.CDLL(None)
    place, length = first * mmap.PAGESIZE, count * mmap.PAGESIZE
    done = libc.madvise(ctypes.c_void_p(place), ctypes.c_size_t(length), _MADV_DONTNEED)
    return int(present.sum()) * mmap.PAGESIZE if done == 0 else 0


def _all_of_file(pages: np.ndarray) -> bool:
    return bool(((pages & _OF_FILE) != 0).all())
