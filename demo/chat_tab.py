"""The Chat tab: pictures, questions, answers that grow; stop, regenerate, undo, edit, clear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from demo.components import SamplingControls, path_of, picture_input, question_box, sampling_of
from demo.conversation import (
    Conversation,
    Exchange,
    answer,
    as_text,
    exchange_of_message,
    from_text,
    messages,
)
from demo.guard import reported
from demo.options import DemoOptions
from demo.pictures import open_upload
from mllm.chat import ChatModel

# Gradio runs one event of this group at a time: the models share the machine.
COMPUTES: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
EMPTY: dict[str, Any] = {"text": "", "files": []}


def build_chat_tab(
    model: ChatModel, options: DemoOptions, examples: list[tuple[str, str]]
) -> gr.State:
    """Lay out the tab.

    Returns:
        The conversation, for other tabs.
    """
    conversation = gr.State((), time_to_live=6 * 3600)
    chatbot = gr.Chatbot(
        label="Conversation",
        show_label=False,
        height="58vh",
        min_height=280,
        editable="user",
        # Gradio cannot edit a question that shares a bubble with its picture.
        group_consecutive_messages=False,
        buttons=["copy"],
        allow_tags=False,
        latex_delimiters=[],
        placeholder="**Show a picture and ask about it**\n\nor try one of these",
        examples=[{"text": question, "files": [file]} for file, question in examples],
        elem_id="chat",
    )
    box = question_box("Question")
    box.elem_id = "question"
    box.autofocus = True
    with gr.Row():
        with gr.Accordion("Camera", open=False):
            camera = picture_input("Camera", ["webcam"], show_label=False, height=300)
        with gr.Column():
            controls = SamplingControls.build(options)

    def stream(conversation: Conversation, *sampling: float) -> Iterator[Any]:
        """Answer the last question; the box offers to stop meanwhile."""
        yield (
            conversation,
            messages(conversation, pending=True),
            box_update(running=True, value=EMPTY),
        )
        updates = answer(
            model, conversation, sampling_of(options, *sampling), options.max_image_pixels
        )
        for update in updates:
            yield update, messages(update), gr.skip()
        yield gr.skip(), gr.skip(), box_update(running=False)

    def stream_or_restore(
        restored: Conversation, conversation: Conversation, *sampling: float
    ) -> Iterator[Any]:
        try:
            yield from stream(conversation, *sampling)
        except Exception:
            asked = conversation[-1]
            back = {"text": asked.question, "files": list(asked.pictures)}
            yield restored, messages(restored), box_update(running=False, value=back)
            raise

    @reported
    def ask(message: dict[str, Any], conversation: Conversation, *sampling: float) -> Iterator[Any]:
        exchange = new_exchange(message, options)
        yield from stream_or_restore(conversation, (*conversation, exchange), *sampling)

    @reported
    def retry(conversation: Conversation, *sampling: float) -> Iterator[Any]:
        if not conversation:
            raise gr.Error("There is nothing to regenerate yet.")
        *before, last = conversation
        again = replace(last, answer="", attempt=last.attempt + 1)
        yield from stream_or_restore(conversation, (*before, again), *sampling)

    @reported
    def edit(data: gr.EditData, conversation: Conversation, *sampling: float) -> Iterator[Any]:
        number = exchange_of_message(conversation, data.index)
        changed = replace(conversation[number], question=from_text(str(data.value)), answer="")
        yield from stream_or_restore(conversation, (*conversation[:number], changed), *sampling)

    def undo(conversation: Conversation) -> Any:
        *before, last = conversation
        text = {"text": last.question, "files": list(last.pictures)}
        return tuple(before), messages(tuple(before)), text

    def stopped(conversation: Conversation) -> Any:
        return messages(conversation), box_update(running=False)

    def add_photo(message: dict[str, Any], photo: dict[str, Any] | None) -> Any:
        files = [file["path"] for file in message["files"]]
        taken = path_of(photo)
        return {"text": message["text"], "files": [*files, taken] if taken else files}, None

    def take_example(data: gr.SelectData) -> Any:
        files = [file["path"] for file in data.value.get("files", [])]
        return {"text": data.value["text"], "files": files}

    outputs = [conversation, chatbot, box]
    settings = controls.inputs
    asked = box.submit(
        ask, [box, conversation, *settings], outputs, show_progress_on=chatbot, **COMPUTES
    )
    picked = chatbot.example_select(take_example, None, box, **AT_ONCE).then(
        ask, [box, conversation, *settings], outputs, show_progress_on=chatbot, **COMPUTES
    )
    retried = chatbot.retry(
        retry, [conversation, *settings], outputs, show_progress_on=chatbot, **COMPUTES
    )
    edits = chatbot.edit(
        edit, [conversation, *settings], outputs, show_progress_on=chatbot, **COMPUTES
    )
    running = [asked, picked, retried, edits]
    box.stop(stopped, conversation, [chatbot, box], cancels=running, **AT_ONCE)
    chatbot.undo(undo, conversation, outputs, cancels=running, **AT_ONCE)
    chatbot.clear(
        lambda: ((), [], box_update(running=False)), None, outputs, cancels=running, **AT_ONCE
    )
    camera.input(add_photo, [box, camera], [box, camera], preprocess=False, **AT_ONCE)
    return conversation


def new_exchange(message: dict[str, Any], options: DemoOptions) -> Exchange:
    """What was sent, its pictures checked."""
    for file in message["files"]:
        for note in open_upload(file, options.max_image_pixels).notes:
            gr.Info(as_text(note) + ".")
    return Exchange(message["text"] or "", tuple(message["files"]))


def box_update(running: bool, value: dict[str, Any] | None = None) -> Any:
    """An update of the question box: while an answer is computed it sends nothing but "stop"."""
    changes: dict[str, Any] = {"stop_btn": running, "submit_btn": not running}
    if value is not None:
        changes["value"] = value
    return gr.MultimodalTextbox(**changes)
