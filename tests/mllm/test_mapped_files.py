"""Memory of mapped weights: handed back where the file has them, and nowhere else."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm.mapped_files import holds_fp32, release_file_pages

_SIZE = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's page map")


def mapped(folder: Path) -> tuple[Tensor, Tensor]:
    """A tensor of a file, and what it holds."""
    values = torch.arange(_SIZE, dtype=torch.float32)
    save_file({"x": values}, folder / "x.safetensors")
    return load_file(folder / "x.safetensors")["x"], values


def test_released_weights_are_read_from_their_file_again(tmp_path: Path) -> None:
    tensor, values = mapped(tmp_path)
    tensor.sum()
    assert 4 * _SIZE - 8192 <= release_file_pages([tensor]) <= 4 * _SIZE
    assert release_file_pages([tensor]) == 0  # it is gone
    assert torch.equal(tensor, values)


def test_changed_weights_are_kept(tmp_path: Path) -> None:
    tensor, values = mapped(tmp_path)
    tensor.data[_SIZE // 2] = -1
    assert release_file_pages([tensor]) == 0
    values[_SIZE // 2] = -1
    assert torch.equal(tensor, values)


def test_weights_without_a_file_are_kept() -> None:
    tensor = torch.arange(_SIZE, dtype=torch.float32)
    assert release_file_pages([tensor, torch.zeros(_SIZE), torch.zeros(3)]) == 0
    assert torch.equal(tensor, torch.arange(_SIZE, dtype=torch.float32))


def test_only_fp32_files_are_mapped_as_they_are(tmp_path: Path) -> None:
    assert not holds_fp32(tmp_path)
    mapped(tmp_path)
    assert holds_fp32(tmp_path)
    save_file({"y": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "y.safetensors")
    assert not holds_fp32(tmp_path)
