"""Matrix products of any model's linear layers by oneDNN, where it is the quicker kernel.

On a CPU PyTorch takes MKL's fp32 product, which on AMD's AVX-512 processors runs at less than half
the speed of oneDNN's, both in full fp32 (94 to 106 against 220 to 240 GFLOP/s on one core, at the
shapes of SmolLM2-135M). A language model's layers belong to transformers, so their calls are
caught; the tower has the same for its own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Multiply-adds from which oneDNN's new kernel for a shape (0.3 ms) is paid back.
_WORTH_A_KERNEL = 2**25


class QuickLinear(TorchFunctionMode):
    """While it is entered, large fp32 products on a CPU go to oneDNN; for inference only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and not kwargs and _suits_onednn(*args):
            return _linear(*args)
        return func(*args, **kwargs)


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return bool(
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        # A quantised weight is a Parameter of another class.
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() * weight.shape[0] >= _WORTH_A_KERNEL
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product.view(*x.shape[:-1], -1)
