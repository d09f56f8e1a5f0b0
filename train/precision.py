"""Which number format a run computes in."""

import torch

from train.recipe import Precision


def use_bf16(precision: Precision) -> bool:
    """Whether to run under bf16 autocast; weights and optimiser stay fp32 either way.

    ``auto`` says yes on a GPU or processor (AVX512-BF16, AMX) that computes bf16 natively; where it
    is emulated it is slower than fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
