"""Some rows of a batch to each thread, through all of a language model's blocks.

On a CPU the threads of an operation wait for each other at its end, dozens of times in a block; and
the small ones, of which attention within rows consists, gain little from a second thread. Rows do
not depend on each other: a thread that has its own meets the others once in the forward pass and
once in the backward pass.

T tokens of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from train.row_attention import LineOfRows


def run_in_threads(
    function: Callable[[Tensor, slice, LineOfRows], Tensor],
    line: Tensor,
    rows: LineOfRows,
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """``function`` of the whole line, by as many threads as PyTorch has, as far as there are rows.

    Args:
        function: Takes a part of the line, where it is in it, and its rows; gives ``(1, t, D)``.
        line: ``(1, T, D)``.
        rows: Where they are in the line.
        parameters: Those within ``function`` that train.

    Returns:
        ``(1, T, D)``.
    """
    count = min(torch.get_num_threads(), len(rows.lengths))
    if count < 2 or not torch.is_grad_enabled():
        return function(line, slice(None), rows)
    output: Tensor = _InThreads.apply(function, line, rows.parts(count), *parameters)
    return output


@contextmanager
def in_one_thread() -> Iterator[None]:
    """As what counts operations and bytes needs it: it sees those of its own thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _InThreads(torch.autograd.Function):
    """Each part has a graph of its own; gradients of parameters are added up in the parts' order,
    so that a run that is repeated has the same."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor, slice, LineOfRows], Tensor],
        line: Tensor,
        parts: list[tuple[slice, LineOfRows]],
        *parameters: Tensor,
    ) -> Tensor:
        kind = line.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        needs_input_grad = ctx.needs_input_grad[1]

        def run(part: tuple[slice, LineOfRows]) -> tuple[Tensor, Tensor]:
            place, rows = part
            entered = line[:, place].detach().requires_grad_(needs_input_grad)
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled):
                return entered, function(entered, place, rows)

        ctx.graphs = _each(run, parts)
        ctx.places = [place for place, _ in parts]
        ctx.parameters = parameters
        return torch.cat([left.detach() for _, left in ctx.graphs], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[1]

        def run(number: int) -> tuple[Tensor | None, ...]:
            entered, left = ctx.graphs[number]
            inputs = [*([entered] if wanted else []), *ctx.parameters]
            mine = grad[:, ctx.places[number]].to(left.dtype)
            return torch.autograd.grad(left, inputs, mine, allow_unused=True)

        by_part = _each(run, range(len(ctx.graphs)))
        del ctx.graphs
        line = torch.cat([grads[0] for grads in by_part], dim=1) if wanted else None
        of_parameters = zip(*(grads[int(wanted) :] for grads in by_part), strict=True)
        return None, line, None, *map(_sum, of_parameters)


def _sum(grads: Sequence[Tensor | None]) -> Tensor | None:
    """In their order; of a parameter that no part reads there are none."""
    present = [one for one in grads if one is not None]
    return sum(present[1:], present[0]) if present else None


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """``function`` of each, at the same time; PyTorch's threads are shared among them."""
    share = max(1, torch.get_num_threads() // len(items))

    def run(item: Any) -> Any:
        torch.set_num_threads(share)  # of this thread alone
        return function(item)

    return list(_pool(len(items)).map(run, items))


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rows")
