"""The plot and the page of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mllm.compare import Comparison, as_points, example_fields
from mllm.evaluate_scores import Prediction
from mllm.tasks import Task
from vision_moe import InputError, atomic_write_bytes, atomic_write_text

#: Pictures that are shown for each side.
NUM_SHOWN = 24
_SIDE = 192  # pixels
_COLORS = ("#0b66a8", "#e08a00", "#3a8f5c", "#8250a8")


def draw(task: Task, comparisons: Sequence[Comparison], file: Path) -> None:
    """Write the differences with their intervals as a picture."""
    atomic_write_bytes(file, _plot(task, comparisons))


def _plot(task: Task, comparisons: Sequence[Comparison]) -> bytes:
    metrics = [each.metric for each in comparisons[0].differences]
    height = 1.4 + 0.32 * len(metrics) * max(1, len(comparisons) / 2)
    figure = Figure(figsize=(7.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(0, color="#888888", linewidth=1)
    for number, one in enumerate(comparisons):
        shift = (number - (len(comparisons) - 1) / 2) * 0.22
        rows = [metrics.index(each.metric) + shift for each in one.differences
                if each.metric in metrics]  # fmt: skip
        shown = [each for each in one.differences if each.metric in metrics]
        middle = [as_points(task, each.difference) for each in shown]
        # Of a percentile interval the mean may lie outside by a rounding.
        low = [max(0, as_points(task, each.difference - each.low)) for each in shown]
        high = [max(0, as_points(task, each.high - each.difference)) for each in shown]
        axes.errorbar(
            middle, rows, xerr=[low, high], fmt="o", capsize=3,
            color=_COLORS[number % len(_COLORS)], label=_plain(f"{one.names[1]}"),
        )  # fmt: skip
    labels = [f"{each.metric} (n = {each.n})" for each in comparisons[0].differences]
    axes.set_yticks(range(len(metrics)), [_plain(label) for label in labels])
    axes.invert_yaxis()
    axes.margins(y=0.12)
    unit = "" if task.graded else ", points"
    axes.set_xlabel(_plain(f"difference to {comparisons[0].names[0]}{unit}, 95 % interval"))
    axes.spines[["top", "right"]].set_visible(False)
    if len(comparisons) > 1:
        axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would take it for a formula


def write_page(task: Task, comparisons: Sequence[Comparison], file: Path, seed: int) -> None:
    """Write table, plot and the pictures on which two checkpoints differ."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [
        {"comparison": one, "groups": _groups(task, one, seed), "rows": _rows(task, one)}
        for one in comparisons
    ]
    page = environment.get_template("compare.html.j2").render(
        task=task, plot=_data_uri(_plot(task, comparisons)), sections=sections
    )
    atomic_write_text(file, page)


def _rows(task: Task, comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "metric": each.metric,
            "n": each.n,
            "a": f"{as_points(task, each.a):.1f}",
            "b": f"{as_points(task, each.b):.1f}",
            "difference": f"{as_points(task, each.difference):+.1f}",
            "interval": f"{as_points(task, each.low):+.1f} to {as_points(task, each.high):+.1f}",
            "only_a": each.only_a,
            "only_b": each.only_b,
            "p": None if each.p_value is None else f"{each.p_value:.2g}",
            "sure": each.low > 0 or each.high < 0,
        }
        for each in comparison.differences
    ]


def _groups(task: Task, comparison: Comparison, seed: int) -> list[dict[str, Any]]:
    """The questions for b and those for a; a draw where there are many."""
    examples = [example_fields(pair) for pair in comparison.differing()]
    groups = []
    for name, sign in ((comparison.names[1], 1), (comparison.names[0], -1)):
        found = [one for one in examples if one["gain"] * sign > 0]
        shown = found
        if len(found) > NUM_SHOWN:
            shown = random.Random(seed).sample(found, NUM_SHOWN)
        for one in shown:
            one["picture"], one["fault"] = _picture(task, one["a"])
        groups.append({"name": name, "number": len(found), "shown": shown})
    return groups


def _picture(task: Task, prediction: Prediction) -> tuple[str | None, str]:
    if prediction.image is None:
        return None, "no picture"
    try:
        picture = task.open_image(prediction.image)
    except InputError as error:
        return None, str(error)
    picture.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return _data_uri(content.getvalue()), ""


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
