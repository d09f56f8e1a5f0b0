"""Running a model without its memory: what a step allocates, and what it multiplies."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class PeakMemory(TorchDispatchMode):
    """Adds up the storages that operators make while the block lasts.

    Attributes:
        now: Bytes that are held.
        peak: The most that ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._track, output)
        return output

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


def to_fake(
    module: nn.Module, mode: FakeTensorMode, device: torch.device
) -> dict[int, Tensor]:
    """Make a module of the meta device one that looks as if it stood on ``device``, in place.

    Returns:
        What stands for each parameter and buffer, by the old one's ``id``.
    """
    made: dict[int, Tensor] = {}
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    # As an ordinary tensor: the converter keeps a parameter on the meta device.
                    fake: Tensor = mode.fake_tensor_converter.from_meta_and_device(
                        mode, tensor.detach().to("meta"), device
                    )
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
    return made
