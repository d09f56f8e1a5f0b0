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
            self._fill(index, change)

    @classmethod
    def empty(cls, base: nn.Module, num_experts: int, rank: int) -> "LowRankExperts":
        """E experts that are all the base, for a checkpoint to fill."""
        parts = split_ffn(base)
        state = _deltas(base, parts, rank).state_dict()
        return cls(base, [state] * (num_experts - 1))

    def _fill(self, index: int, change: Mapping[str, Tensor]) -> None:
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

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What expert ``index`` alone makes of ``(T, D)``."""
        weights = x.new_ones(x.shape[0], 1)
        groups = [x.new_zeros(0, dtype=torch.long)] * len(self)
        groups[index] = torch.arange(x.shape[0], device=x.device)
        return self.mix(x, groups, [weights[group] for group in groups])

    def mix(self, x: Tensor, tokens: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The experts' weighted sum for each token.

        Args:
            x: ``(T, D)``.
            tokens: for each expert the numbers ``(T_e,)`` of the tokens that chose it.
            weights: for each expert ``(T_e, 1)``; those of a token sum to one.

        Returns:
            ``(T, D)``.
        """
        base, parts = self.base, self.parts
        products = [base.get_submodule(name)(x) for name in parts.ups]         # W1 x, once
        mixed, change = None, None
        for index, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
            ups = [product.index_select(0, token) for product in products]
            if index:
                group = x.index_select(0, token)
                ups = [
                    up + self._change(name, index, group)
                    for name, up in zip(parts.ups, ups, strict=True)
                ]
            hidden = parts.hidden(base, ups)                                    # (T_e, H)
            hidden = hidden * weight.to(hidden.dtype)
            if mixed is None:
                mixed = hidden.new_zeros(x.shape[0], hidden.shape[-1])
            mixed = mixed.index_add(0, token, hidden)
            if index:
                down = self._change(parts.down, index, hidden, weight)
                if change is None:
                    change = down.new_zeros(x.shape[0], down.shape[-1])
                change = change.index_add(0, token, down)
        assert mixed is not None
        output = base.get_submodule(parts.down)(mixed)                         # W2 sum_e w_e h_e
        if change is not None:
            output = output + change
        return parts.finish(base, output)

    def _change(self, name: str, index: int, x: Tensor, weight: Tensor | None = None) -> Tensor:
        delta = _delta(self.deltas, name)
        y = nn.functional.linear(
            nn.functional.linear(x, delta.a[index - 1]), delta.b[index - 1]
        )
        if delta.bias is None:
            return y
        bias = delta.bias[index - 1]
        return y + (bias if weight is None else weight * bias).to(y.dtype)
