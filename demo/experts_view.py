"""Routing as HTML: the picture under a colored grid, and what each expert got."""

from __future__ import annotations

import base64
import colorsys
import io
from html import escape

from demo.routing import BlockRouting, Routing

# Okabe and Ito: told apart by color-blind people too; on light and dark ground.
_COLORS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999",
)  # fmt: skip

CSS = """
.experts-map { max-width: 460px; margin: 0 auto; }
.experts-map svg { width: 100%; height: auto; display: block; border-radius: 8px;
  image-rendering: auto; touch-action: manipulation; }
.experts-map svg:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.experts-map rect { stroke: none; }
.experts-map rect.here { stroke: #fff; stroke-width: 2; paint-order: stroke;
  vector-effect: non-scaling-stroke; filter: drop-shadow(0 0 1px #000); }
.experts-readout { min-height: 3.2em; padding: 8px 2px; font-variant-numeric: tabular-nums;
  color: var(--body-text-color); }
.experts-load { width: 100%; border: 0 !important; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
.experts-load thead, .experts-load tbody, .experts-load tr { border: 0 !important; }
.experts-load th, .experts-load td { padding: 5px 8px; text-align: right;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  color: var(--body-text-color); }
.experts-load th { font-weight: 600; color: var(--body-text-color-subdued); }
.experts-load th:first-child, .experts-load td:first-child { text-align: left;
  white-space: nowrap; }
.experts-load .bar { width: 34%; text-align: left; }
.experts-load .bar div { height: 10px; border-radius: 5px; min-width: 2px; }
.experts-chip { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 7px; vertical-align: -1px; }
.experts-load tr.now td { font-weight: 700; background: var(--background-fill-secondary); }
.experts-scroll { overflow-x: auto; }
.experts-note { color: var(--body-text-color-subdued); }
"""

# The weights of the patch under the mouse, the finger, or the cursor that arrow keys move.
JS = """
const show = (rect) => {
  element.querySelectorAll('rect.here').forEach((one) => one.classList.remove('here'));
  const readout = element.querySelector('.experts-readout');
  if (!rect || !readout) return;
  rect.classList.add('here');
  readout.textContent = rect.dataset.text;
};
const at = (event) => { if (event.target.tagName === 'rect') show(event.target); };
element.addEventListener('pointermove', at);
element.addEventListener('pointerdown', at);
element.addEventListener('keydown', (event) => {
  const svg = event.target.closest('svg');
  if (!svg) return;
  const columns = Number(svg.dataset.columns);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const rects = [...svg.querySelectorAll('rect')];
  const now = rects.findIndex((one) => one.classList.contains('here'));
  show(rects[Math.min(Math.max(now < 0 ? 0 : now + step, 0), rects.length - 1)]);
});
"""


def color_of(expert: int, num_experts: int) -> str:
    """The color of an expert, ``#rrggbb``."""
    if num_experts <= len(_COLORS):
        return _COLORS[expert]
    red, green, blue = colorsys.hls_to_rgb(expert / num_experts, 0.5, 0.75)
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def overlay(routing: Routing, block_number: int) -> str:
    """The picture, each patch in the color of its heaviest expert, the surer the stronger."""
    block = routing.blocks[block_number]
    rows, columns = block.grid
    width, height = routing.image.size
    rects = []
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        experts, weights = block.experts[number], block.weights[number]
        shares = ", ".join(
            f"expert {expert}: {weight:.0%}"
            for expert, weight in zip(experts, weights, strict=True)
        )
        text = f"Row {row + 1}, column {column + 1} — {shares}"
        rects.append(
            f'<rect x="{column * width / columns:g}" y="{row * height / rows:g}"'
            f' width="{width / columns:g}" height="{height / rows:g}"'
            f' fill="{color_of(int(experts[0]), block.num_experts)}"'
            f' fill-opacity="{0.15 + 0.55 * float(weights[0]):.2f}" data-text="{escape(text)}"/>'
        )
    return (
        f'<div class="experts-map"><svg viewBox="0 0 {width} {height}" tabindex="0" role="img"'
        f' data-columns="{columns}" aria-label="The picture; each patch has the color of its'
        f' heaviest expert in {block.name}. Arrow keys move from patch to patch.">'
        f'<image href="{_data_url(routing)}" width="{width}" height="{height}"/>'
        f"{''.join(rects)}</svg>"
        '<div class="experts-readout" aria-live="polite">Point at a patch, or focus the picture'
        " and use the arrow keys, to see its weights.</div></div>"
    )


def load_table(block: BlockRouting) -> str:
    """What each expert of a block got of the picture."""
    num_patches, top_k = block.experts.shape
    rows = []
    for expert, (load, tokens, first) in enumerate(
        zip(block.load, block.tokens, block.first_choices, strict=True)
    ):
        color = color_of(expert, block.num_experts)
        rows.append(
            f'<tr><td><span class="experts-chip" style="background:{color}"></span>expert {expert}'
            f"</td><td>{tokens}</td><td>{first}</td><td>{load:.0%}</td>"
            f'<td class="bar"><div style="width:{load:.1%};background:{color}"></div></td></tr>'
        )
    return (
        f'<p class="experts-note">In {block.name}, each of the picture\'s {num_patches} tokens goes'
        f" to {top_k} of {block.num_experts} experts.</p>"
        '<div class="experts-scroll"><table class="experts-load"><thead><tr><th>Expert</th>'
        '<th>Tokens</th><th title="Tokens whose heaviest expert it is">First</th><th>Load</th>'
        "<th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def all_blocks_table(routing: Routing, block_number: int) -> str:
    """The load of each expert in each block; the block that is shown stands out."""
    num_experts = max(block.num_experts for block in routing.blocks)
    heads = "".join(
        f'<th><span class="experts-chip" style="background:{color_of(expert, num_experts)}">'
        f"</span>{expert}</th>"
        for expert in range(num_experts)
    )
    rows = "".join(
        f"<tr{' class=now' if number == block_number else ''}><td>{block.name}</td>"
        + "".join(f"<td>{load:.0%}</td>" for load in block.load)
        + "</tr>"
        for number, block in enumerate(routing.blocks)
    )
    return (
        '<div class="experts-scroll"><table class="experts-load"><thead><tr><th>Load</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _data_url(routing: Routing) -> str:
    buffer = io.BytesIO()
    routing.image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
