"""How tokens reach their experts: the one place that knows.

The T*K (token, expert) pairs are sorted by expert. Then

- on a CPU each expert takes its tokens piece by piece, so that what lies between its two products
  stays in the cache;
- on a GPU, and where ``torch.compile`` traces, all experts' products are one grouped product;
- low-rank experts share their base's products (:mod:`vision_moe.low_rank`).

T tokens in all, D width, H hidden features, E experts, K top-k, S = T*K pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_moe.feed_forward import FFNParts
from vision_moe.low_rank import LowRankExperts
from vision_moe.products import grouped_linear, linear, num_filling_rows

#: Tokens that go through an expert at once on a CPU; ``(512, H)`` fp32 is 8 MB in ViT-L.
_PIECE = 512


@dataclass(frozen=True)
class SortedPairs:
    """The pairs in the order of their experts.

    ``order`` ``(S,)``: numbers of the pairs as the tokens list them; ``token`` and ``expert``
    ``(S,)``: of each pair; ``counts`` ``(E,)``: how many pairs each expert
    has; ``place`` ``(T, K)``: where a token's pairs lie.
    """

    order: Tensor
    token: Tensor
    expert: Tensor
    counts: Tensor
    place: Tensor


def sort_by_expert(chosen: Tensor, num_experts: int) -> SortedPairs:
    """Sort the choices ``(T, K)`` by expert; nothing waits for the device."""
    flat = chosen.reshape(-1)                                               # (S,)
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    experts = torch.arange(num_experts, device=flat.device)
    counts = (flat.unsqueeze(0) == experts.unsqueeze(1)).sum(1)             # no bincount: it syncs
    token = order.div(chosen.shape[-1], rounding_mode="floor")
    return SortedPairs(order, token, flat[order], counts, place.view_as(chosen))


def dispatch(
    experts: nn.ModuleList | LowRankExperts,
    parts: FFNParts | None,
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
) -> Tensor:
    """Send each token to its experts, and mix what they answer.

    Args:
        experts: E of them.
        parts: of each expert; ``None`` where it cannot be taken apart.
        x: ``(T, D)``.
        weights: ``(T, K)``, each row summing to one.
        chosen: ``(T, K)``, numbers of experts.

    Returns:
        ``(T, D)``, in the precision that an expert answers in.
    """
    on_cpu = x.device.type == "cpu"
    tracing = torch.compiler.is_compiling()
    by_piece = on_cpu and not tracing and not torch.is_grad_enabled() and len(x) > 0
    if isinstance(experts, LowRankExperts):
        if by_piece and not torch.is_autocast_enabled("cpu"):
            return _low_rank_by_piece(experts, x, weights, chosen)
        return experts.mix(x, weights, chosen)
    groupable = parts is not None and _is_groupable(experts, parts)
    if tracing and not groupable:
        return _run_all(experts, x, weights, chosen)
    pairs = sort_by_expert(chosen, len(experts))
    if by_piece:
        rows = _run_by_piece(experts, parts, x, pairs)
    elif groupable and (tracing or not on_cpu):
        assert parts is not None
        rows = _run_grouped(experts, parts, x, pairs)
    else:
        rows = _run_loop(experts, x, pairs)
    return _combine(rows, weights, pairs)


def run_expert(experts: nn.ModuleList | LowRankExperts, index: int, x: Tensor) -> Tensor:
    """``(T, D) -> (T, D)`` by one expert alone."""
    if isinstance(experts, LowRankExperts):
        chosen = torch.full((x.shape[0], 1), index, device=x.device)
        return experts.mix(x, torch.ones_like(chosen, dtype=torch.float32), chosen)
    return experts[index](x)


def _is_groupable(experts: nn.ModuleList, parts: FFNParts) -> bool:
    """Whether the experts differ in plain linear layers alone, all on one device."""
    first = experts[0]
    between = [first.get_submodule(name) for name in (*parts.between, *parts.after)]
    linears = [expert.get_submodule(name) for expert in experts for name in parts.linears]
    return not any(True for module in between for _ in module.parameters()) and all(
        type(layer) is nn.Linear for layer in linears
    )


def _combine(grouped: Tensor, weights: Tensor, pairs: SortedPairs) -> Tensor:
    """The weighted sum ``(T, D)`` of each token's rows in ``(S, D)``."""
    weights = weights.to(grouped.dtype)
    if grouped.device.type == "cpu" and not grouped.requires_grad and len(grouped):
        # One pass over the rows, without a copy of them.
        return nn.functional.embedding_bag(
            pairs.place, grouped, per_sample_weights=weights, mode="sum"
        )
    rows = grouped.index_select(0, pairs.place.reshape(-1)).unflatten(0, weights.shape)
    return (rows * weights.unsqueeze(-1)).sum(1)


def _run_loop(experts: nn.ModuleList, x: Tensor, pairs: SortedPairs) -> Tensor:
    """``(S, D)``. Experts without a token run on an empty slice: they stay in the graph with zero
    gradients, and data-parallel training does not wait for them forever."""
    fills = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    outputs = []
    for expert, token in zip(experts, pairs.token.split(pairs.counts.tolist()), strict=True):
        extra = num_filling_rows(len(token)) if fills else 0                # copies of token 0
        group = x.index_select(0, nn.functional.pad(token, (0, extra)))
        outputs.append(expert(group)[: len(token)])
    return torch.cat(outputs)


def _run_by_piece(
    experts: nn.ModuleList, parts: FFNParts | None, x: Tensor, pairs: SortedPairs
) -> Tensor:
    """``(S, D)``, without gradients."""
    rows = []
    for expert, token in zip(experts, pairs.token.split(pairs.counts.tolist()), strict=True):
        for piece in token.split(_PIECE) if len(token) else ():
            group = x.index_select(0, piece)
            rows.append(expert(group) if parts is None else _by_products(parts, expert, group))
    return torch.cat(rows)


def _by_products(parts: FFNParts, ffn: nn.Module, x: Tensor) -> Tensor:
    hidden = parts.hidden(ffn, [linear(ffn.get_submodule(name), x) for name in parts.ups])
    return parts.finish(ffn, linear(ffn.get_submodule(parts.down), hidden))


def _run_grouped(
    experts: nn.ModuleList, parts: FFNParts, x: Tensor, pairs: SortedPairs
) -> Tensor:
    """``(S, D)``, each linear layer as one product for all experts."""
    ends = pairs.counts.cumsum(0).to(torch.int32)
    first = experts[0]

    def product(name: str, x: Tensor) -> Tensor:
        layers: list[Any] = [one.get_submodule(name) for one in experts]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = grouped_linear(x, [layer.weight.to(x.dtype) for layer in layers], ends)
        if layers[0].bias is None:
            return y
        biases = torch.stack([layer.bias.to(x.dtype) for layer in layers])
        return y + biases.index_select(0, pairs.expert)

    x = x.index_select(0, pairs.token)
    hidden = parts.hidden(first, [product(name, x) for name in parts.ups])
    return parts.finish(first, product(parts.down, hidden))


def _run_all(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Every expert on every token, most of them with weight zero: for experts that are one opaque
    module, where the shapes must not depend on the routing."""
    mixed = None
    for index, expert in enumerate(experts):
        weight = (weights * (chosen == index)).sum(1, keepdim=True)         # (T, 1)
        output = expert(x)
        output = output * weight.to(output.dtype)
        mixed = output if mixed is None else mixed + output
    assert mixed is not None
    return mixed


def _low_rank_by_piece(
    experts: LowRankExperts, x: Tensor, weights: Tensor, chosen: Tensor
) -> Tensor:
    """:meth:`LowRankExperts.mix` without gradients: no product with what was not chosen."""
    base, parts = experts.base, experts.parts
    expand = {name: experts.expansion(name) for name in parts.linears}      # (E - 1, out, R + 1)
    down = base.get_submodule(parts.down)
    outputs = []
    for piece, weight, choice in zip(
        x.split(_PIECE), weights.split(_PIECE), chosen.split(_PIECE), strict=True
    ):
        pairs = sort_by_expert(choice, len(experts))
        scale = weight.reshape(-1, 1)[pairs.order].to(x.dtype)              # (P*K, 1)
        products = [linear(base.get_submodule(name), piece) for name in parts.ups]
        reduced = [experts.reduction(name, piece) for name in parts.ups]    # (P, E - 1, R + 1)
        hiddens = []
        kept = piece.new_zeros(len(piece), *expand[parts.down].shape[::2])
        counts = pairs.counts.tolist()
        for index, (token, share) in enumerate(
            zip(pairs.token.split(counts), scale.split(counts), strict=True)
        ):
            ups = [product.index_select(0, token) for product in products]
            if index:
                for name, up, small in zip(parts.ups, ups, reduced, strict=True):
                    up.addmm_(small[token, index - 1], expand[name][index - 1].t())
            hidden = parts.hidden(base, ups)
            hiddens.append(hidden)
            if index:
                small = experts.reduction(parts.down, hidden, index)[:, 0]
                kept[token, index - 1] = small * share
        mixed = nn.functional.embedding_bag(
            pairs.place, torch.cat(hiddens), per_sample_weights=weight.to(x.dtype), mode="sum"
        )
        output = linear(down, mixed)
        output.addmm_(kept.flatten(1), expand[parts.down].transpose(0, 1).flatten(1).t())
        outputs.append(parts.finish(base, output))
    return torch.cat(outputs)
