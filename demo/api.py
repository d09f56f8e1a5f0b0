"""What programs call by name: ``/chat``, ``/route``, ``/similarity``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from demo.components import sampling_of
from demo.conversation import Conversation, Exchange, answer
from demo.guard import reported
from demo.loading import Models
from demo.options import DemoOptions
from demo.pictures import open_upload
from demo.routing import route
from demo.similarity_tab import as_json, similarities
from vision_moe import InputError

_COMPUTES: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def add_api(models: Models, options: DemoOptions) -> None:
    """Add the named functions to the page, where nobody sees them."""

    @reported
    def chat(
        pictures: list[str] | None,
        question: str,
        history: Any,
        temperature: float | None,
        top_p: float | None,
        max_new_tokens: float | None,
        seed: float | None,
    ) -> Iterator[str]:
        """Stream the answer to a question about pictures, the text so far each time.

        ``history`` is what was said before, ``[[question, answer], ...]``; the pictures belong to
        its first question.
        """
        conversation = _conversation(pictures or [], question, history)
        sampling = sampling_of(options, temperature, top_p, None, max_new_tokens, seed)
        for update in answer(models.chat, conversation, sampling, options.max_image_pixels):
            yield update[-1].answer

    @reported
    def routing(picture: str | None) -> dict[str, Any]:
        """Which experts each patch went to, block by block; no blocks for a dense tower."""
        return route(models.chat, _open(picture, options)).as_json()

    @reported
    def similarity(picture: str | None, captions: Any) -> dict[str, Any]:
        """Cosine and probability of each caption for a picture, to each CLIP."""
        if not isinstance(captions, list):
            raise InputError("captions is not a list of texts")
        return as_json(similarities(models.clips, _open(picture, options), captions))

    with gr.Column(visible=False):
        button = gr.Button()
        text, json = gr.Textbox(), gr.JSON()
        button.click(
            chat,
            [
                gr.File(label="pictures", file_count="multiple", type="filepath"),
                gr.Textbox(label="question"),
                gr.JSON([], label="history"),
                gr.Number(0.2, label="temperature"),
                gr.Number(0.9, label="top_p"),
                gr.Number(128, label="max_new_tokens"),
                gr.Number(0, label="seed"),
            ],
            text,
            api_name="chat",
            **_COMPUTES,
        )
        button.click(
            routing, gr.File(label="picture", type="filepath"), json, api_name="route", **_COMPUTES
        )
        button.click(
            similarity,
            [gr.File(label="picture", type="filepath"), gr.JSON([], label="captions")],
            json,
            api_name="similarity",
            **_COMPUTES,
        )


def _open(path: str | None, options: DemoOptions) -> Any:
    if path is None:
        raise InputError("there is no picture")
    return open_upload(path, options.max_image_pixels).image


def _conversation(pictures: list[str], question: str, history: Any) -> Conversation:
    said = history or []
    pairs = isinstance(said, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
        for pair in said
    )
    if not pairs:
        raise InputError("history is not a list of [question, answer]")
    exchanges = [Exchange(asked, (), answered) for asked, answered in said]
    exchanges.append(Exchange(str(question)))
    first = exchanges[0]
    return (Exchange(first.question, tuple(pictures), first.answer), *exchanges[1:])
