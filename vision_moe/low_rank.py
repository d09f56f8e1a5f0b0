"""Low-rank experts: one frozen feed-forward network, and for each expert a small change of it.

With the base ``y = W2 act(W1 x)``, an expert of rank r has ``W1 + B1 A1`` and ``W2 + B2 A2``. The
experts that a token chooses share the base's products: ``W1 x`` is computed once, and so is
``W2 sum_e w_e h_e``; what is left for each expert is of rank r.

A low-rank expert is trained as a :class:`LowRankFFN` in the place of the dense network. Its
``deltas`` are then stacked in a :class:`LowRankExperts`, whose expert 0 is the base itself::

    stage = LowRankFFN(ffn, rank=32)             # trains: stage.deltas.parameters()
    experts = LowRankExperts(ffn, [stage.deltas.state_dict(), ...])
    moe = MoEFeedForward(experts, width, top_k=2)

T tokens, D width, H hidden features, E experts, K top-k, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_moe.errors import InputError
from vision_moe.feed_forward import FFNParts, split_ffn


class LowRankDelta(nn.Module):
    """``x -> b a x + bias``: the change of one linear layer, or of it in several experts.

    Args:
        linear: the layer that changes; its shape, type and device are taken.
        rank: R.
        leading: ``()``, or ``(E - 1,)`` for the experts' changes stacked.
    """

    def __init__(self, linear: nn.Linear, rank: int, leading: tuple[int, ...] = ()) -> None:
        super().__init__()
        weight = linear.weight

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.zeros(*leading, *shape, dtype=weight.dtype, device=weight.device)
            )

        self.a = zeros(rank, linear.in_features)
        self.b = zeros(linear.out_features, rank)
        has_bias: bool = linear.bias is not None
        self.bias = zeros(linear.out_features) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(T, in) -> (T, out)``"""
        return nn.functional.linear(nn.functional.linear(x, self.a), self.b, self.bias)


def _deltas(
    ffn: nn.Module, parts: FFNParts, rank: int, leading: tuple[int, ...] = ()
) -> nn.ModuleDict:
    """A change of nothing for each linear layer, by its name."""
    if rank < 1:
        raise InputError(f"rank is {rank}, it must be at least 1")
    deltas = nn.ModuleDict()
    for name in parts.linears:
        linear = ffn.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        deltas[name] = LowRankDelta(linear, rank, leading)
    return deltas


def _delta(deltas: nn.ModuleDict, name: str) -> LowRankDelta:
    delta = deltas[name]
    assert isinstance(delta, LowRankDelta)
    return delta


class LowRankFFN(nn.Module):
    """A feed-forward network with one low-rank change, which starts at nothing.

    Args:
        base: the network, frozen here and taken over, not copied; two linear layers, or three
            (gate, value and down), with anything between them.
        rank: R.
        generator: draws ``a``; torch's global one by default.
    """

    def __init__(
        self, base: nn.Module, rank: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.parts = split_ffn(base)
        self.base = base.requires_grad_(False)
        self.deltas = _deltas(base, self.parts, rank)
        for name in self.parts.linears:
            # As LoRA: a as nn.Linear draws it, b at zero.
            a = _delta(self.deltas, name).a
            bound = 1 / math.sqrt(a.shape[-1])
            nn.init.uniform_(a, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., D)``"""
        base, parts = self.base, self.parts
        products = [base.get_submodule(name)(x) + self.deltas[name](x) for name in parts.ups]
        hidden = parts.hidden(base, products)
        down = base.get_submodule(parts.down)(hidden) + self.deltas[parts.down](hidden)
        return parts.finish(base, down)

    def __getattr__(self, name: str) -> Any:
        """Parts of the base: open_clip asks a block for ``mlp.c_fc.weight.dtype``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is not None and name in base._modules:
                return base._modules[name]
            raise


class LowRankExperts(nn.Module):
    """E experts on one base: expert 0 is the base, expert j has the changes of ``changes[j - 1]``.

    Weights: ``base.*`` as in the dense network, ``deltas.<linear>.a`` ``(E - 1, R, in)``, ``.b``
    ``(E - 1, out, R)`` and ``.bias`` ``(E - 1, out)``.

    Args:
        base: the dense feed-forward network, taken over, not copied.
        changes: E - 1 state dicts of :attr:`LowRankFFN.deltas`; smaller ranks are filled up with
            zeros.
    """

    def __init__(self, base: nn.Module, changes: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        if not changes:
            raise InputError("low-rank experts need one change at least beside the base")
        self.parts = split_ffn(base)
        self.base = base
        rank = max(
            (v.shape[0] for change in changes for k, v in change.items() if k.endswith(".a")),
            default=0,
        )
        self.deltas = _deltas(base, self.parts, rank, (len(changes),))
        for index, change in enumerate(changes):
            self.fill(index, change)

    @classmethod
    def empty(cls, base: nn.Module, num_experts: int, rank: int) -> "LowRankExperts":
        """E experts that are all the base, for a checkpoint to fill."""
        parts = split_ffn(base)
        state = _deltas(base, parts, rank).state_dict()
        return cls(base, [state] * (num_experts - 1))

    @torch.no_grad()
    def fill(self, index: int, change: Mapping[str, Tensor]) -> None:
        """Copy a change into that of expert ``index + 1``."""
        own = self.deltas.state_dict()
        if own.keys() != change.keys():
            wrong = sorted(own.keys() ^ change.keys())[0]
            raise InputError(f"low-rank expert {index + 1}: {wrong} is missing or unknown")
        for name, value in change.items():
            target = own[name][index]
            if target.dim() == 2:
                dim = 0 if name.endswith(".a") else 1
                target = target.narrow(dim, 0, min(value.shape[dim], target.shape[dim]))
            if target.shape != value.shape:
                raise InputError(
                    f"low-rank expert {index + 1}: {name} has shape {tuple(value.shape)},"
                    f" not {tuple(target.shape)}"
                )
            target.copy_(value)

    @property
    def rank(self) -> int:
        """R."""
        return _delta(self.deltas, self.parts.down).a.shape[-2]

    def __len__(self) -> int:
        return _delta(self.deltas, self.parts.down).a.shape[0] + 1

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum of each token's experts, in shapes that do not depend on the routing.

        ``A x`` is taken for all experts at once; what a token has not chosen is set to zero.

        Args:
            x: ``(T, D)``.
            weights: ``(T, K)``, each row summing to one.
            chosen: ``(T, K)``.

        Returns:
            ``(T, D)``.
        """
        base, parts = self.base, self.parts
        products = {name: base.get_submodule(name)(x) for name in parts.ups}   # W1 x, once
        reduced = {name: self.reduce(name, x) for name in parts.ups}           # A x, of all experts
        mixed, change = None, None
        for slot in range(chosen.shape[1]):
            picked = self.pick(chosen[:, slot])                                # (T, E - 1)
            weight = weights[:, slot : slot + 1]
            ups = [products[n] + self.expand(n, reduced[n], picked) for n in parts.ups]
            hidden = parts.hidden(base, ups)                                   # (T, H)
            hidden = hidden * weight.to(hidden.dtype)
            down = self.reduce(parts.down, hidden)
            # The weight is in `hidden` already; the bias needs it.
            down = self.expand(parts.down, down, picked, picked * weight)
            mixed = hidden if mixed is None else mixed + hidden
            change = down if change is None else change + down
        assert mixed is not None and change is not None
        output = base.get_submodule(parts.down)(mixed) + change                # W2 sum_e w_e h_e
        return parts.finish(base, output)

    def pick(self, chosen: Tensor) -> Tensor:
        """``(T,)`` numbers of experts -> ``(T, E - 1)``: one where the expert is that one."""
        others = torch.arange(1, len(self), device=chosen.device)
        return (chosen.unsqueeze(1) == others).float()

    def reduce(self, name: str, x: Tensor) -> Tensor:
        """``A x`` of all experts: ``(T, in) -> (T, (E - 1) R)``."""
        return nn.functional.linear(x, _delta(self.deltas, name).a.flatten(0, 1))

    def expand(
        self, name: str, reduced: Tensor, picked: Tensor, bias_weight: Tensor | None = None
    ) -> Tensor:
        """``B A x`` and bias of the expert that each token has chosen.

        Args:
            name: of the linear layer.
            reduced: ``(T, (E - 1) R)``.
            picked: ``(T, E - 1)``.
            bias_weight: ``(T, E - 1)``; ``picked`` by default.

        Returns:
            ``(T, out)``.
        """
        delta = _delta(self.deltas, name)
        picked = picked.to(reduced.dtype)
        kept = (reduced.unflatten(1, (-1, self.rank)) * picked.unsqueeze(2)).flatten(1)
        y = nn.functional.linear(kept, delta.b.transpose(0, 1).flatten(1))
        if delta.bias is None:
            return y
        bias_weight = picked if bias_weight is None else bias_weight.to(reduced.dtype)
        return y + nn.functional.linear(bias_weight, delta.bias.t())

    def reduction(self, name: str, x: Tensor, expert: int | None = None) -> Tensor:
        """``A x`` with a one behind it for the bias: ``(T, in) -> (T, E - 1, R + 1)``.

        Args:
            name: of the linear layer.
            x: ``(T, in)``.
            expert: of this one alone, ``(T, 1, R + 1)``.
        """
        delta = _delta(self.deltas, name)
        a = delta.a if expert is None else delta.a[expert - 1 : expert]
        reduced = nn.functional.linear(x, a.flatten(0, 1)).unflatten(1, a.shape[:2])
        return reduced if delta.bias is None else nn.functional.pad(reduced, (0, 1), value=1.0)

    def expansion(self, name: str) -> Tensor:
        """What :meth:`reduction` is multiplied with: ``(E - 1, out, R + 1)``."""
        delta = _delta(self.deltas, name)
        return delta.b if delta.bias is None else torch.cat([delta.b, delta.bias.unsqueeze(2)], 2)
