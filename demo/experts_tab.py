"""The See-the-experts tab: where the last picture's patches went."""

from __future__ import annotations

from typing import Any

import gradio as gr

from demo.chat_tab import AT_ONCE, COMPUTES
from demo.components import path_of, picture_input
from demo.conversation import Conversation, last_picture
from demo.experts_view import JS, all_blocks_table, load_table, overlay
from demo.guard import reported
from demo.options import DemoOptions
from demo.pictures import open_upload
from demo.routing import Routing, route
from mllm.chat import ChatModel
from vision_moe import moe_layers

_DENSE = """### This tower is dense

Its blocks have one feed-forward network each, which every patch goes through: there are no experts
to see. A checkpoint with a CLIP-MoE tower shows here which expert each patch went to."""


def build_experts_tab(
    tab: gr.Tab, model: ChatModel, options: DemoOptions, conversation: gr.State
) -> None:
    """Lay out the tab."""
    layers = moe_layers(model.model.model.vision_tower)
    if not layers:
        gr.Markdown(_DENSE, elem_id="dense")
        return
    routing = gr.State(None, time_to_live=6 * 3600)
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            block = gr.Slider(
                0, len(layers) - 1, 0, step=1, label="MoE block, from the first to the last",
                visible=len(layers) > 1, elem_id="block",
            )  # fmt: skip
            view = gr.HTML(_hint(), js_on_load=JS, elem_id="overlay")
        with gr.Column(scale=2, min_width=300):
            picture = picture_input("Picture", height=220)
            loads = gr.HTML(elem_id="loads")
            with gr.Accordion("Load of every block", open=False):
                all_blocks = gr.HTML()

    views = [view, loads, all_blocks]

    def draw(found: Routing | None, number: float) -> tuple[str, str, str]:
        if found is None:
            return _hint(), "", ""
        at = min(max(int(number), 0), len(found.blocks) - 1)
        return (
            overlay(found, at),
            load_table(found.blocks[at]),
            all_blocks_table(found, at),
        )

    @reported
    def see(payload: dict[str, Any] | None, number: float) -> tuple[Any, ...]:
        path = path_of(payload)
        if path is None:
            return (None, *draw(None, number))
        opened = open_upload(path, options.max_image_pixels)
        for note in opened.notes:
            gr.Info(note + ".")
        found = route(model, opened.image)
        return (found, *draw(found, number))

    def last(conversation: Conversation) -> Any:
        path = last_picture(conversation)
        return gr.skip() if path is None else path

    tab.select(last, conversation, picture, **AT_ONCE)
    picture.change(see, [picture, block], [routing, *views], preprocess=False, **COMPUTES)
    block.change(draw, [routing, block], views, **AT_ONCE)


def _hint() -> str:
    return (
        '<p class="experts-note">Show a picture in the chat, or here, to see which expert each of'
        " its patches went to.</p>"
    )
