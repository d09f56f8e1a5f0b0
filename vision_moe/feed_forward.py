"""The anatomy of a feed-forward network: linear layers up, what stands between, one linear down.

T tokens, D width, H hidden features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_moe.errors import InputError


@dataclass(frozen=True)
class FFNParts:
    """Names of a feed-forward network's parts, so that its products can be taken one by one.

    ``down(between(up(x)))`` and then ``after``. Names, not modules: a wrapped or quantised layer
    stands under the old name.

    Attributes:
        ups: linear layers ``D -> H``; two of them are gate and value, ``D -> 2H`` is both packed.
        between: modules between the products, in their order (activation first).
        down: the linear layer ``H -> D``.
        after: modules behind it (dropout).
        gate: ``none``; ``first`` or ``second``: which half the activation acts on.
    """

    ups: tuple[str, ...]
    between: tuple[str, ...]
    down: str
    after: tuple[str, ...]
    gate: Literal["none", "first", "second"]

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers, the last one down."""
        return (*self.ups, self.down)

    def hidden(self, ffn: nn.Module, products: Sequence[Tensor]) -> Tensor:
        """From the up layers' products, ``(T, H)`` each (or ``(T, 2H)``), to what goes down."""
        modules = [ffn.get_submodule(name) for name in self.between]
        if self.gate == "none":
            (x,) = products
        else:
            activation, *modules = modules
            gate, value = products if len(products) == 2 else products[0].chunk(2, dim=-1)
            if self.gate == "second":
                gate, value = value, gate
            x = activation(gate) * value
        for module in modules:
            x = module(x)
        return x

    def finish(self, ffn: nn.Module, x: Tensor) -> Tensor:
        """What follows the product down, ``(T, D)``."""
        for name in self.after:
            x = ffn.get_submodule(name)(x)
        return x

    def __call__(self, ffn: nn.Module, x: Tensor) -> Tensor:
        """The network itself, ``(T, D) -> (T, D)``."""
        products = [ffn.get_submodule(name)(x) for name in self.ups]
        return self.finish(ffn, ffn.get_submodule(self.down)(self.hidden(ffn, products)))


def split_ffn(ffn: nn.Module) -> FFNParts:
    """Take a feed-forward network apart by its structure.

    The parts are tried on random tokens, with random weights, against the network itself.

    Raises:
        InputError: It is something else than linear layers with modules between them, or it
            computes otherwise than those modules say.
    """
    what = f"a {type(ffn).__name__} feed-forward network"
    children = dict(ffn.named_children())
    linears = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    if not 2 <= len(linears) <= 3 or any(
        isinstance(part, nn.Linear)
        for name, child in children.items()
        if name not in linears
        for part in child.modules()
    ):
        raise InputError(f"{what} is not two linear layers, or three, with modules between them")
    *ups, down = linears
    order = list(children)
    others = [name for name in order if name not in linears]
    packed = linears[ups[0]].out_features == 2 * linears[down].in_features
    gate: Literal["none", "first", "second"] = "none"
    if len(ups) == 2 or packed:
        gate = "second" if getattr(ffn, "gate_last", False) else "first"
    parts = FFNParts(
        ups=tuple(ups),
        between=tuple(name for name in others if order.index(name) < order.index(down)),
        down=down,
        after=tuple(name for name in others if order.index(name) > order.index(down)),
        gate=gate,
    )
    key = (tuple(type(module) for module in ffn.modules()), str(ffn))
    if key not in _VERDICTS:
        _VERDICTS[key] = _computes_the_same(parts, ffn)
    if not _VERDICTS[key]:
        raise InputError(f"{what} computes something else than its modules in their order")
    return parts


#: Of networks that have been tried: a tower's are all alike.
_VERDICTS: dict[Any, bool] = {}


class _BothWays(nn.Module):
    def __init__(self, parts: FFNParts, ffn: nn.Module) -> None:
        super().__init__()
        self.parts, self.ffn = parts, ffn

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts(self.ffn, x), self.ffn(x)


@torch.no_grad()
def _computes_the_same(parts: FFNParts, ffn: nn.Module) -> bool:
    """Try it with weights of its own making: the network's may be on the meta device."""
    down = ffn.get_submodule(parts.down)
    assert isinstance(down, nn.Linear)
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.empty(*shape, device="cpu").uniform_(-0.1, 0.1, generator=generator)

    both = _BothWays(parts, ffn)
    was_training = {module: module.training for module in ffn.modules()}
    ffn.eval()                                             # dropout would differ between two calls
    try:
        state = {name: draw(value.shape) for name, value in both.state_dict().items()}
        x = draw((3, down.out_features))
        ours, theirs = torch.func.functional_call(both, state, (x,))
        return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    except (IndexError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        for module, training in was_training.items():
            module.training = training
