"""The allocator is told to keep memory where there is a glibc, and left alone elsewhere."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from mllm.allocator import keep_freed_memory


def test_glibc_is_told_to_keep_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[int, int] = {}
    library = SimpleNamespace(mallopt=settings.__setitem__)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    keep_freed_memory()
    assert settings == {-4: 0, -1: 2**31 - 1, -2: 64 << 20}  # no maps, no trimming, 64 MiB at once


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace())
    keep_freed_memory()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(_name: None) -> None:
        raise AssertionError("no C library is opened")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", unexpected)
    keep_freed_memory()
