"""The allocator is told to keep memory where there is a glibc, and left alone elsewhere."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mllm.allocator import grow_in_huge_pages, keep_freed_memory


def test_glibc_is_told_to_keep_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[int, int] = {}
    library = SimpleNamespace(mallopt=settings.__setitem__)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    keep_freed_memory()
    # No maps, no trimming, 64 MiB at once, one heap for all threads.
    assert settings == {-4: 0, -1: -1, -2: 64 << 20, -8: 1}


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace())
    keep_freed_memory()
    grow_in_huge_pages()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(_name: None) -> None:
        raise AssertionError("no C library is opened")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", unexpected)
    keep_freed_memory()
    grow_in_huge_pages()


# Prints the bytes in use after products with 300 lengths, and after 300 other ones.
PROGRAM = """
import ctypes
import torch
from mllm.allocator import keep_freed_memory

keep_freed_memory()
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks used fordblks keepcost".split()
info = type("Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in names]})
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = info
weight = torch.zeros(256, 256, dtype=torch.bfloat16)
for start in (100, 400):
    for length in range(start, start + 300):
        torch.nn.functional.linear(torch.zeros(length, 256, dtype=torch.bfloat16), weight)
    print(mallinfo().used)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc"
)
def test_memory_does_not_grow_with_every_new_length() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200, check=True
    )
    before, after = map(int, done.stdout.split())
    # Measured: 0.04 MB, and 167 MB with the libraries' own limits.
    assert after - before < 5e6


# Prints the bytes that the call takes, then what the system knows of where a tensor lies.
HUGE = """
import re
import torch
from mllm.allocator import grow_in_huge_pages, hand_back_freed_memory, keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024

keep_freed_memory()
hand_back_freed_memory()
before = resident()
grow_in_huge_pages()
print(resident() - before)
middle = torch.ones(16 << 20)[8 << 20 :].data_ptr()
areas = re.findall(
    r"^(\\w+)-(\\w+) .*?^VmFlags: (.*?)$", open("/proc/self/smaps").read(), re.MULTILINE | re.DOTALL
)
print(next(flags for start, end, flags in areas if int(start, 16) <= middle < int(end, 16)))
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="asks Linux for huge pages"
)
def test_heap_grows_in_huge_pages_and_takes_no_memory_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUGE], capture_output=True, text=True, timeout=200, check=True
    )
    taken, flags = done.stdout.splitlines()
    assert int(taken) < 1e6
    assert "hg" in flags.split()
