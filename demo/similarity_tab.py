"""The Zero-shot tab: how well captions fit a picture, to dense CLIP and to CLIP-MoE."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
import torch
from PIL import Image

from demo.chat_tab import COMPUTES
from demo.components import path_of, picture_input
from demo.conversation import as_text
from demo.guard import reported
from demo.options import DemoOptions
from demo.pictures import open_upload
from vision_moe import CLIPMoEModel, InputError

MAX_CAPTIONS = 64
_MAX_CAPTION_CHARACTERS = 2000
_NO_CLIP = """### No CLIP is loaded

The quickstart lays a dense CLIP and a CLIP-MoE beside its checkpoint, where the demo finds them.
Name them otherwise:

```
mllm demo CHECKPOINT --clip CLIP_MOE_FOLDER --dense-clip CLIP_FOLDER
```"""

CSS = """
.similarity { width: 100%; border: 0 !important; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
.similarity thead, .similarity tbody, .similarity tr { border: 0 !important; }
.similarity th, .similarity td { padding: 6px 8px; text-align: left;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  color: var(--body-text-color); }
.similarity th { color: var(--body-text-color-subdued); }
.similarity td:first-child { overflow-wrap: anywhere; min-width: 5em; }
.similarity .meter { display: flex; align-items: center; gap: 8px; min-width: 5em; }
.similarity .meter div { height: 10px; border-radius: 5px; min-width: 2px; background: #0072b2; }
.similarity .best { font-weight: 700; }
"""


@torch.inference_mode()
def similarities(
    clips: dict[str, CLIPMoEModel], picture: Image.Image, captions: list[str]
) -> dict[str, dict[str, list[float]]]:
    """For each CLIP the cosine of each caption, and its probability among them.

    Raises:
        InputError: There is no CLIP, or no caption, or too many or too long ones.
    """
    if not clips:
        raise InputError("no CLIP is loaded")
    captions = [str(caption).strip() for caption in captions]
    if not captions or not all(captions):
        raise InputError("there is no caption to compare the picture with")
    if len(captions) > MAX_CAPTIONS or max(map(len, captions)) > _MAX_CAPTION_CHARACTERS:
        raise InputError(
            f"up to {MAX_CAPTIONS} captions of up to {_MAX_CAPTION_CHARACTERS:,} characters are"
            " compared at once"
        )
    found = {}
    for name, clip in clips.items():
        image = clip.encode_image(clip.preprocess(picture).unsqueeze(0).to(clip.device))  # (1, P)
        text = clip.encode_text(clip.tokenizer(captions).to(clip.device))  # (C, P)
        cosine = torch.nn.functional.cosine_similarity(image, text)  # (C,)
        probability = (clip.logit_scale.exp() * cosine).softmax(0)
        found[name] = {"cosine": cosine.tolist(), "probability": probability.tolist()}
    return found


def build_similarity_tab(
    clips: dict[str, CLIPMoEModel], options: DemoOptions, examples: list[tuple[str, str]]
) -> None:
    """Lay out the tab."""
    if not clips:
        gr.Markdown(_NO_CLIP, elem_id="no-clip")
        return
    with gr.Row():
        with gr.Column(min_width=300):
            picture = picture_input("Picture", height=300)
        with gr.Column(min_width=300):
            captions = gr.Textbox(
                "a circle\na rectangle\na triangle", label="Captions, one a line", lines=5,
                max_lines=12, elem_id="captions",
            )  # fmt: skip
            button = gr.Button("Score the captions", variant="primary", elem_id="similarity-run")
    result = gr.HTML(elem_id="similarity")
    gr.Examples([[file] for file, _ in examples], picture, cache_examples=False, label="Examples")

    @reported
    def compare(payload: dict[str, Any] | None, text: str) -> str:
        path = path_of(payload)
        if path is None:
            raise InputError("there is no picture yet")
        opened = open_upload(path, options.max_image_pixels)
        for note in opened.notes:
            gr.Info(as_text(note) + ".")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return _table(lines, similarities(clips, opened.image, lines))

    button.click(compare, [picture, captions], result, preprocess=False, **COMPUTES)


def _table(captions: list[str], found: dict[str, dict[str, list[float]]]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in found)
    rows = []
    for number, caption in enumerate(captions):
        cells = ""
        for scores in found.values():
            share = scores["probability"][number]
            best = " class=best" if share == max(scores["probability"]) else ""
            cells += (
                f'<td{best}><div class="meter"><div style="width:{share * 60:.1f}%"></div>'
                f"{share:.0%}</div><small>cosine {scores['cosine'][number]:.3f}</small></td>"
            )
        rows.append(f"<tr><td>{escape(caption)}</td>{cells}</tr>")
    return (
        f'<div class="experts-scroll"><table class="similarity"><thead><tr><th>Caption</th>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def as_json(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """What the API returns: ``dense`` and ``clip_moe``, as far as they are loaded."""
    keys = {"Dense CLIP": "dense", "CLIP-MoE": "clip_moe"}
    return {keys[name]: scores for name, scores in found.items()}
