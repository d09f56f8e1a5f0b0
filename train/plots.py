"""Charts as inline SVG, drawn in stand-in colors that become CSS variables of the page around them.

So one drawing serves light and dark pages. The page defines ``--ink``, ``--muted``, ``--grid``,
``--first`` and ``--second``.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK, _MUTED, _GRID, _FIRST, _SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {
    _INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _FIRST: "--first", _SECOND: "--second",
}  # fmt: skip
_SERIES_COLORS = (_FIRST, _SECOND)

#: Right edge of the column of values, in lengths of the longest possible bar.
_COLUMN = 1.25

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # the page's own font; small files, and text that can be selected
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": _INK,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "figure.constrained_layout.use": True,
}


def loss_curve(name: str, title: str, steps: Sequence[float], losses: Sequence[float]) -> Markup:
    """Loss by step: every logged value pale, their running mean bold.

    Args:
        name: Unique on the page; starts the drawing's ids.
        title: Says what is drawn to those who cannot see it.
        steps: ``(n,)``.
        losses: ``(n,)``.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.2, 1.9))
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.plot(steps, losses, color=_FIRST, alpha=0.35, linewidth=1.0)
        axes.plot(steps, running_mean(losses), color=_FIRST, linewidth=2.0,
                  marker="o" if len(steps) == 1 else None)  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("step")
        return _inline(figure, name, f"{title}: loss {losses[0]:.2f} to {losses[-1]:.2f}")


def running_mean(values: Sequence[float], memory: float = 0.6) -> list[float]:
    """Exponential mean of the values so far, without a bias towards the first."""
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = memory * total + value, memory * weight + 1.0
        means.append(total / weight)
    return means


def bars(
    name: str,
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    text: Callable[[float], str],
    limit: float,
    reference: float | None = None,
    num_referenced: int | None = None,
) -> Markup:
    """Lying bars, one or two for each label, from zero, the values in a column beside them.

    Args:
        name: Unique on the page; starts the drawing's ids.
        title: Says what is drawn to those who cannot see it.
        labels: ``(n,)``, from the top.
        series: One or two, ``(n,)`` each; the page's legend says which color is whose.
        text: Writes a value.
        limit: The value that fills the width.
        reference: Where a dashed line stands.
        num_referenced: Labels that it passes, from the top; all by default.
    """
    assert 1 <= len(series) <= len(_SERIES_COLORS)
    thickness = 0.8 / len(series)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.7, 0.3 + len(labels) * (0.16 + 0.17 * len(series))))
        axes = figure.subplots()
        for number, (values, color) in enumerate(
            zip(series.values(), _SERIES_COLORS, strict=False)
        ):
            offset = (number - (len(series) - 1) / 2) * thickness
            positions = [index + offset for index in range(len(labels))]
            axes.barh(positions, values, height=0.9 * thickness, color=color)
            for position, value in zip(positions, values, strict=True):
                axes.text(_COLUMN * limit, position, text(value), ha="right", va="center")
        if reference is not None:
            end = (num_referenced or len(labels)) - 0.5
            axes.plot(
                [reference] * 2, [-0.5, end], color=_INK, linewidth=1.2, linestyle=(0, (4, 3))
            )
        axes.set_yticks(range(len(labels)), labels, color=_INK)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, _COLUMN * limit)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _inline(figure, name, title)


def _inline(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an ``<svg>`` element that depends on, and disturbs, nothing on its page."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    attributes = Markup('<svg role="img" aria-label="{}"').format(title)
    return Markup(svg.replace("<svg", attributes, 1))
