"""Which attention kernel is chosen, and that the choice changes nothing but the time."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from train.attention import attention_kernel

CPU = torch.device("cpu")


def fused_kernels_are_allowed() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


def test_short_sequences_on_a_cpu_take_plain_products() -> None:
    with attention_kernel(CPU, 34):
        assert not fused_kernels_are_allowed()
    assert fused_kernels_are_allowed()


@pytest.mark.parametrize(("device", "length"), [("cpu", 1024), ("cuda", 34)])
def test_otherwise_the_choice_is_left_to_torch(device: str, length: int) -> None:
    with attention_kernel(torch.device(device), length):
        assert fused_kernels_are_allowed()


def test_both_kernels_give_the_same() -> None:
    query, key, value = torch.randn(3, 2, 4, 34, 16, generator=torch.Generator().manual_seed(0))
    with attention_kernel(CPU, 34):
        plain = scaled_dot_product_attention(query, key, value, is_causal=True)
    fused = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5)
