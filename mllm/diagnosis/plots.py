"""A diagnosis in pictures: the numbers on one sheet, and who sees which patch on another."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mllm.diagnosis.data import DiagnosticData
from mllm.diagnosis.measure import I2T, T2I, Diagnosis
from vision_moe import (
    CLIPMoEModel,
    InputError,
    atomic_write_bytes,
    record_routing,
    routing_survey,
)

#: Okabe and Ito's, told apart by the colour-blind; repeated beyond eight experts.
EXPERT_COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555",
)  # fmt: skip
_MAX_PICTURES = 5


def expert_color(expert: int) -> str:
    return EXPERT_COLORS[expert % len(EXPERT_COLORS)]


def draw_diagnosis(diagnosis: Diagnosis, title: str, file: str | Path) -> None:
    """Write the numbers as one picture."""
    figure = Figure(figsize=(17, 15), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3)
    _solo(axes[0, 0], diagnosis)
    _oracle(axes[0, 1], diagnosis)
    _leave_one_out(axes[0, 2], diagnosis)
    _square(axes[1, 0], diagnosis.cka["image"], "picture features: CKA between experts", (0, 1))
    _square(axes[1, 1], diagnosis.cka["text"], "text features: CKA between experts", (0, 1))
    kappa = diagnosis.complementarity[T2I]["kappa"]
    _square(axes[1, 2], kappa, f"{T2I}: Cohen's kappa of hits", (0, 1))
    _load(axes[2, 0], diagnosis)
    _entropies(axes[2, 1], diagnosis)
    _information(axes[2, 2], diagnosis)
    figure.suptitle(f"{title} on {diagnosis.data['name']}", fontsize=14)
    save_figure(figure, file)


def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure, whole or not at all.

    Raises:
        InputError: It cannot be written, or not as that type of file.
    """
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=110, format=Path(file).suffix[1:] or "png")
    except ValueError as error:  # a file type that matplotlib does not write
        raise InputError(f"'{file}': {error}") from error
    atomic_write_bytes(file, picture.getvalue())


def _solo(axes: Any, diagnosis: Diagnosis) -> None:
    rows = list(diagnosis.shares)
    queries = list(diagnosis.shares[rows[0]])
    values = np.array([[diagnosis.shares[row][query] for query in queries] for row in rows])
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.55 else "black"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color,
                  fontsize=8)  # fmt: skip
    axes.set_xticks(range(len(queries)), queries, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title("answered by each expert alone and by the mixture, %")


def _oracle(axes: Any, diagnosis: Diagnosis) -> None:
    queries = list(diagnosis.oracle)
    gaps = [diagnosis.oracle[query] for query in queries]
    positions = np.arange(len(queries))
    axes.hlines(positions, [100 * gap.best_single for gap in gaps],
                [100 * gap.oracle for gap in gaps], color="#c6d4e8", linewidth=6)  # fmt: skip
    marks = [("best expert", "best_single", "o", "#999999"), ("mixture", "mixture", "d", "#D55E00"),
             ("any expert", "oracle", "|", "#0072B2")]  # fmt: skip
    for label, name, marker, color in marks:
        axes.plot([100 * getattr(gap, name) for gap in gaps], positions, marker, color=color,
                  label=label, markersize=9, markeredgewidth=2)  # fmt: skip
    if diagnosis.control_oracle is not None:
        control = [100 * diagnosis.control_oracle[query].oracle for query in queries]
        axes.plot(control, positions, "x", color="black", label="any expert of the control")
    axes.set_yticks(positions, queries)
    axes.invert_yaxis()
    axes.set_xlabel("answered, %")
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    axes.set_title("from the best expert to any expert")


def _leave_one_out(axes: Any, diagnosis: Diagnosis) -> None:
    experts = list(diagnosis.leave_one_out)
    positions = np.arange(len(experts))
    for offset, query, color in ((-0.18, I2T, "#0072B2"), (0.18, T2I, "#E69F00")):
        found = [diagnosis.leave_one_out[expert][query] for expert in experts]
        values = np.array([100 * one.difference for one in found])
        errors = np.array([[100 * (one.difference - one.low), 100 * (one.high - one.difference)]
                           for one in found]).reshape(-1, 2).T  # fmt: skip
        axes.bar(positions + offset, values, 0.34, yerr=errors.clip(0), color=color, label=query,
                 capsize=3)  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(positions, [f"without\n{one}" for one in experts])
    axes.set_ylabel("points (95 % interval)")
    axes.legend(fontsize=8)
    axes.set_title("retrieval without one expert, against the mixture")


def _square(axes: Any, values: np.ndarray, title: str, limits: tuple[float, float]) -> None:
    axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap="Blues")
    middle = sum(limits) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > middle else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    names = [str(number) for number in range(len(values))]
    axes.set_xticks(range(len(values)), names)
    axes.set_yticks(range(len(values)), names)
    axes.set_xlabel("expert")
    axes.set_ylabel("expert")
    axes.set_title(title)


def _load(axes: Any, diagnosis: Diagnosis) -> None:
    """Shares of the choices, stacked, a bar for each block (all kinds of token together)."""
    blocks = list(diagnosis.survey)
    counts = [
        np.sum([one.choices for one in diagnosis.survey[block].values()], axis=0)
        for block in blocks
    ]
    load = np.array([one / one.sum() for one in counts])
    left = np.zeros(len(blocks))
    for expert in range(load.shape[1]):
        axes.barh(range(len(blocks)), load[:, expert], left=left, color=expert_color(expert),
                  label=f"expert {expert}")  # fmt: skip
        left += load[:, expert]
    axes.set_yticks(range(len(blocks)), block_names(blocks))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the choices")
    axes.legend(fontsize=8, ncols=load.shape[1], loc="upper center", bbox_to_anchor=(0.5, -0.1))
    axes.set_title("load of the experts, by block")


def _entropies(axes: Any, diagnosis: Diagnosis) -> None:
    blocks = list(diagnosis.survey)
    kinds = list(dict.fromkeys(kind for of_block in diagnosis.survey.values() for kind in of_block))
    for kind, color in zip(kinds, EXPERT_COLORS, strict=False):
        here = [index for index, block in enumerate(blocks) if kind in diagnosis.survey[block]]
        found = [diagnosis.survey[blocks[index]][kind].statistics() for index in here]
        axes.plot([one.load_entropy for one in found], here, "o-", color=color,
                  label=f"load, {kind}")  # fmt: skip
        axes.plot([one.token_entropy for one in found], here, "x:", color=color,
                  label=f"one token, {kind}")  # fmt: skip
    axes.set_yticks(range(len(blocks)), block_names(blocks))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("entropy / log E   (1: even; 0: one expert)")
    axes.legend(fontsize=8, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    axes.set_title("how even the load, how sure the router")


def _information(axes: Any, diagnosis: Diagnosis) -> None:
    rows = [
        (block, kind) for block, kinds in diagnosis.survey.items() for kind in sorted(kinds)
    ]
    factors = list(diagnosis.survey[rows[0][0]][rows[0][1]].by_factor)
    if not factors:
        axes.axis("off")
        axes.text(0.5, 0.5, "the data names no factors", ha="center", transform=axes.transAxes)
        return
    values = np.array([
        [diagnosis.survey[block][kind].information().get(factor, 0.0) for factor in factors]
        for block, kind in rows
    ])  # fmt: skip
    picture = axes.imshow(values, vmin=0, cmap="Blues", aspect="auto")
    names = dict(zip(diagnosis.survey, block_names(list(diagnosis.survey)), strict=True))
    axes.set_xticks(range(len(factors)), factors, rotation=40, ha="right")
    labels = [f"{names[block]}, {kind}" for block, kind in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.figure.colorbar(picture, ax=axes, label="bits")
    axes.set_title("what the expert's number tells of a factor")


def block_names(blocks: Sequence[str]) -> list[str]:
    """``visual.…`` -> ``vision 0``, counted within each tower."""
    counted: dict[str, int] = {}
    names = []
    for block in blocks:
        tower = "vision" if block.startswith("visual.") else "text"
        number = counted.get(tower, 0)
        counted[tower] = number + 1
        names.append(f"{tower} {number}")
    return names


@torch.inference_mode()
def draw_patches(clip: CLIPMoEModel, data: DiagnosticData, title: str, file: str | Path) -> None:
    """Write pictures with their patches in the colours of the experts that see them.

    The first choice gives the colour; the surer the router is of it, the stronger it is.
    """
    pictures = [data.pictures[number]() for number in range(min(_MAX_PICTURES, len(data.pictures)))]
    pixels = torch.stack([clip.preprocess(picture) for picture in pictures]).to(clip.device)
    with record_routing(clip.visual) as record:
        clip.encode_image(pixels)
    rows, columns = routing_survey.patch_grid(clip)
    start = routing_survey.num_prefix_tokens(clip)
    probs = {
        name: logits.flatten(1, -2)[:, start : start + rows * columns].float().softmax(-1).cpu()
        for name, logits in record.router_logits.items()
        if logits.flatten(1, -2).shape[1] == start + rows * columns
    }
    if not probs:
        raise InputError("no MoE block of the vision tower has a token for each patch")
    names = dict(zip(record.router_logits, block_names([
        f"visual.{name}" for name in record.router_logits
    ]), strict=True))  # fmt: skip
    chosen = list(probs)
    if len(chosen) > 4:  # the first, the last, and two between
        chosen = [chosen[round(i * (len(chosen) - 1) / 3)] for i in range(4)]
    num_experts = next(iter(probs.values())).shape[-1]
    figure = Figure(figsize=(2.6 * (1 + len(chosen)), 2.7 * len(pictures) + 0.8),
                    layout="constrained")  # fmt: skip
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pictures), 1 + len(chosen), squeeze=False)
    for row, one in enumerate(pixels.cpu()):
        shown = _shown(one, clip)
        axes[row, 0].imshow(shown)
        axes[row, 0].set_title("as the tower sees it", fontsize=9)
        for column, name in enumerate(chosen, start=1):
            overlay = _overlay(probs[name][row].reshape(rows, columns, num_experts).numpy())
            height, width = shown.shape[:2]
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            axes[row, column].imshow(shown.mean(-1), cmap="gray", vmin=0, vmax=1)
            axes[row, column].imshow(overlay, extent=extent, interpolation="nearest")
            axes[row, column].set_title(f"{names[name]}: {routing_survey.PATCH}", fontsize=9)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
    handles = [Patch(color=expert_color(e), label=f"expert {e}") for e in range(num_experts)]
    figure.legend(handles=handles, loc="outside lower center", ncols=num_experts)
    figure.suptitle(f"{title}: the first expert of each patch")
    save_figure(figure, file)


def _shown(pixels: torch.Tensor, clip: CLIPMoEModel) -> np.ndarray:
    """``(3, H, W)`` as the tower gets it -> ``(H, W, 3)`` in [0, 1]."""
    preprocess = clip.config.preprocess
    assert preprocess is not None
    mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
    shown: np.ndarray = (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return shown


def _overlay(probs: np.ndarray) -> np.ndarray:
    """``(rows, columns, E)`` -> RGBA."""
    num_experts = probs.shape[-1]
    colors = np.array([to_rgb(expert_color(expert)) for expert in range(num_experts)])
    best = probs.max(-1)
    sureness = (best - 1 / num_experts) / max(1 - 1 / num_experts, 1e-9)
    alpha = 0.2 + 0.4 * sureness.clip(0, 1)
    return np.concatenate([colors[probs.argmax(-1)], alpha[..., None]], axis=-1)
