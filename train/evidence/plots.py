"""What ``evidence.json`` holds as pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mllm.diagnosis.plots import EXPERT_COLORS, save_figure
from mllm.scenes import FACTORS
from train.evidence.methods import ALL
from train.evidence.tables import ANSWERED_BY, Cells, mean_r1, seeds_of, without_ablations

_BLUE, _ORANGE, _GREEN, *_ = EXPERT_COLORS
_GRAY = "#888888"


def draw(evidence: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every picture that there is something for.

    Returns:
        Their files.
    """
    cells: Cells = evidence["cells"]
    methods = without_ablations(cells)
    split = evidence["config"]["splits"][0]
    drawn = {
        "claims": lambda axes: _claims(axes, evidence["claims"]),
        "retrieval": lambda axes: _retrieval(axes, methods, evidence["config"]["splits"]),
        "factors": lambda axes: _factors(axes, methods, split),
    }
    rows = 0.2 * len({cell["method"] for cell in methods.values()})
    heights = {
        "claims": max(4.2, 1.2 + 0.2 * len(evidence["claims"])),
        "retrieval": max(4.2, 1.2 + rows),
        "factors": max(5.2, 2.2 + rows),
    }
    for suffix, told in ANSWERED_BY.items():
        task = f"scenes{suffix}"
        if asked := {name: cell for name, cell in cells.items() if task in cell}:
            title = f"Questions about scenes{told}, by tower"
            drawn[f"questions{suffix}"] = partial(_questions, asked=asked, task=task, title=title)
            # The names of two methods stand in a line below.
            num_methods = len({cell["method"] for cell in asked.values()})
            heights[f"questions{suffix}"] = 3.8 + 0.2 * math.ceil(num_methods / 2)
    if evidence["experts"]:
        drawn["suppression"] = lambda axes: _suppression(axes, list(evidence["experts"].values()))
    files = []
    for name, fill in drawn.items():
        figure = Figure(figsize=(8.5, heights.get(name, 4.2)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        fill(axes)
        files.append(folder / f"{name}.png")
        save_figure(figure, files[-1])
    return files


def _claims(axes: Any, claims: Mapping[str, Mapping[str, Any]]) -> None:
    shown = {n: c for n, c in claims.items() if n != "low_rank_share_of_gain"}
    positions = np.arange(len(shown))
    for position, claim in zip(positions, shown.values(), strict=True):
        color = _BLUE if claim["reached"] else _ORANGE
        axes.plot([claim["low"], claim["high"]], [position] * 2, color=color, linewidth=3)
        axes.plot(claim["difference"], position, "o", color=color, markersize=8)
        if claim["goal"]:
            axes.plot(claim["goal"], position, "|", color="black", markersize=14)
    axes.axvline(0, color=_GRAY, linewidth=1)
    axes.set_yticks(positions, [name.replace("_", " ") for name in shown])
    axes.invert_yaxis()
    axes.set_xlabel("points; 95 % interval; blue reached, orange missed;\na bar is a goal beside 0")
    axes.set_title("CLIP-MoE (DMU) less its controls")


def _retrieval(axes: Any, cells: Cells, splits: list[str]) -> None:
    methods = [method for method in ALL if seeds_of(cells, method)]
    positions = np.arange(len(methods))
    for number, split in enumerate(splits):
        color = (_BLUE, _ORANGE, _GREEN)[number]
        values = [[100 * mean_r1(cell[split]) for cell in seeds_of(cells, m)] for m in methods]
        offset = 0.12 * (2 * number - len(splits) + 1)
        axes.plot([statistics.mean(one) for one in values], positions + offset, "|", color=color,
                  markersize=13, markeredgewidth=2.5, label=f"{split}, mean")  # fmt: skip
        for position, one in zip(positions, values, strict=True):
            axes.plot(one, [position + offset] * len(one), "o", color=color, alpha=0.5,
                      markersize=4)  # fmt: skip
    axes.set_yticks(positions, [ALL[method].title for method in methods])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd")
    axes.set_xlabel("R@1, mean of both directions, %; a dot is a seed")
    axes.legend(fontsize=8, loc="center")
    axes.set_title("Retrieval on detailed captions")


def _factors(axes: Any, cells: Cells, split: str) -> None:
    methods = [method for method in ALL if seeds_of(cells, method)]
    nan = float("nan")
    values = 100 * np.array(
        [
            [statistics.mean(c[split].get(f, nan) for c in seeds_of(cells, m)) for f in FACTORS]
            for m in methods
        ]
    )
    axes.imshow(values, vmin=50, vmax=100, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 80 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(FACTORS)), FACTORS, rotation=35, ha="right")
    axes.set_yticks(range(len(methods)), [ALL[method].title for method in methods])
    axes.set_title("One-factor changes told apart, % (50 is guessing)")


def _questions(axes: Any, asked: Cells, task: str, title: str) -> None:
    methods = [method for method in ALL if seeds_of(asked, method)]
    first = seeds_of(asked, methods[0])[0][task]
    keys = [key for key in first if key.startswith("accuracy")]
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        found = [cell[task] for cell in seeds_of(asked, method)]
        values = [[100 * one.get(key, float("nan")) for one in found] for key in keys]
        axes.bar(np.arange(len(keys)) + number * width, [statistics.mean(one) for one in values],
                 width, color=EXPERT_COLORS[number % len(EXPERT_COLORS)],
                 hatch="//" if number >= len(EXPERT_COLORS) else "",
                 yerr=[np.std(one, ddof=1) if one[1:] else 0 for one in values],
                 error_kw={"linewidth": 1}, label=ALL[method].title)  # fmt: skip
    names = [key.removeprefix("accuracy").removeprefix("_") or "all" for key in keys]
    axes.set_xticks(np.arange(len(keys)) + 0.4 - width / 2, names)
    axes.set_ylabel("answered, %; a line is a standard deviation")
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    axes.set_title(title)


def _suppression(axes: Any, experts: list[Mapping[str, Any]]) -> None:
    for number, one in enumerate(experts):
        for stage in one["suppression"]:
            if "before" not in stage:
                continue
            x = [stage["stage"] - 0.25, stage["stage"] + 0.25]
            axes.plot(x, [100 * stage["before"], 100 * stage["after"]], "o-",
                      color=EXPERT_COLORS[number % len(EXPERT_COLORS)])  # fmt: skip
    stages = experts[0]["suppression"]
    names = [f"stage {s['stage']} against {s['stage'] - 1}" for s in stages]
    axes.set_xticks([s["stage"] for s in stages], names)
    axes.set_ylabel("R@1 within the clusters so far, %")
    axes.grid(axis="y", color="#dddddd")
    axes.set_title("Suppression test: left the stage before, right the stage; a color is a seed")
