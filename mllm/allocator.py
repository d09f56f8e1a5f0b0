"""The C library's allocator, set up for training on a CPU."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Any

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8

# Bytes that the heap takes beyond each byte that is in use, as what an operator needs for itself
# lies between tensors that stay, and leaves holes there that the next one's do not fit into.
# Measured of SmolLM2, with what lies free after loading handed back: less than nothing with LoRA,
# 0.3 with QLoRA. With this both are within 15 % of the peak.
_HOLES = 0.03

# For every number of tokens that a step has oneDNN compiles kernels, and ideep, between it and
# PyTorch, sets up calls of them; each keeps 1,024 by default. Of SmolLM2 a new number took 24 MB,
# 0.4 GB within 16 steps of conversations; with so few nothing, and a step as long as before.
_KEPT_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128, "LRU_CACHE_CAPACITY": 64}


def heap_holes(size: int) -> int:
    """Bytes that a heap needs beyond those of tensors that come and go, with
    :func:`keep_freed_memory`."""
    return int(_HOLES * size) if _mallopt() is not None else 0


def _mallopt() -> Any | None:
    """glibc's function, where the C library is glibc."""
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of handing it back to the system.

    A training step frees and asks for the same large tensors over and over; by default each is
    mapped anew and zeroed page by page, which takes a tenth and more of a small model's step.
    Where the C library is another one, nothing happens.

    Libraries are told to keep less of what they compile for each number of tokens; before they are
    first used.
    """
    for name, number in _KEPT_KERNELS.items():
        os.environ.setdefault(name, str(number))
    mallopt = _mallopt()
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)  # what one thread frees is the next one's
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_TOP_PAD, 64 << 20)


def hand_back_freed_memory() -> None:
    """What lies free between what is in use, once: in between loading a model and training it.

    Where nothing that training asks for fits into a hole, the hole takes no memory then.
    """
    if _mallopt() is not None:
        ctypes.CDLL(None).malloc_trim(0)


def grow_in_huge_pages() -> None:
    """Let the heap grow in pages of 2 MiB from now on, where Linux gives them to who asks.

    A step of training walks through gigabytes, and every page of 4 KiB takes an entry of the
    processor's address cache, and a fault when it is first touched. Only addresses are taken here:
    memory is when it is written to. After :func:`keep_freed_memory` and
    :func:`hand_back_freed_memory`, which hands back the addresses too.
    """
    if _mallopt() is None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    size = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE // 2
    block = library.malloc(ctypes.c_size_t(size))
    if block is None:
        return
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (block + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    # Refused where the kernel has no such pages: those of 4 KiB serve then.
    library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)
    library.free(ctypes.c_void_p(block))
