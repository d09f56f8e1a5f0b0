"""The Compare tab: two checkpoints answer the same question with the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from demo.chat_tab import AT_ONCE, COMPUTES, EMPTY, box_update, new_exchange
from demo.components import SamplingControls, question_box, sampling_of
from demo.conversation import Conversation, answer, messages
from demo.guard import reported
from demo.loading import Models
from demo.options import DemoOptions

_ONE_MODEL = """### One checkpoint is loaded

Start the demo with a second one, and both answer here side by side, with the same seed:

```
mllm demo CHECKPOINT --compare OTHER
```"""


def build_compare_tab(models: Models, options: DemoOptions) -> None:
    """Lay out the tab."""
    if models.compare is None:
        gr.Markdown(_ONE_MODEL, elem_id="one-model")
        return
    both = (models.chat, models.compare)
    conversations = gr.State(((), ()), time_to_live=6 * 3600)
    chatbots, speeds = [], []
    with gr.Row(equal_height=True):
        for number, name in enumerate((models.chat_name, models.compare_name)):
            with gr.Column(min_width=300):
                chatbots.append(
                    gr.Chatbot(
                        label=name,
                        height="46vh",
                        min_height=240,
                        buttons=["copy"],
                        allow_tags=False,
                        latex_delimiters=[],
                        elem_id=f"compare-{number}",
                    )  # fmt: skip
                )
                speeds.append(gr.Markdown("&nbsp;", elem_id=f"speed-{number}"))
    box = question_box("Question to both")
    box.elem_id = "compare-question"
    with gr.Row():
        clear = gr.Button("Clear", scale=0, min_width=120)
        with gr.Column():
            controls = SamplingControls.build(options)
    outputs = [conversations, *chatbots, *speeds, box]

    @reported
    def ask(
        message: dict[str, Any], told: tuple[Conversation, Conversation], *values: float
    ) -> Iterator[Any]:
        exchange = new_exchange(message, options)
        sampling = sampling_of(options, *values)
        now = [(*told[0], exchange), (*told[1], exchange)]
        try:
            waiting = [messages(one, pending=True) for one in now]
            yield (tuple(now), *waiting, "…", "…", box_update(running=True, value=EMPTY))
            for number, model in enumerate(both):  # in turn: neither slows the other down
                for update in answer(model, now[number], sampling, options.max_image_pixels):
                    now[number] = update
                    shown: list[Any] = [gr.skip(), gr.skip()]
                    shown[number] = messages(update)
                    yield (tuple(now), *shown, gr.skip(), gr.skip(), gr.skip())
                speed = now[number][-1].speed
                texts: list[Any] = [gr.skip(), gr.skip()]
                texts[number] = str(speed)
                yield (gr.skip(), gr.skip(), gr.skip(), *texts, gr.skip())
            yield (*[gr.skip()] * 5, box_update(running=False))
        except Exception:
            back = {"text": exchange.question, "files": list(exchange.pictures)}
            shown = [messages(one) for one in told]
            yield (told, *shown, gr.skip(), gr.skip(), box_update(running=False, value=back))
            raise

    def stopped(told: tuple[Conversation, Conversation]) -> Any:
        return (*[messages(one) for one in told], box_update(running=False))

    asked = box.submit(
        ask, [box, conversations, *controls.inputs], outputs, show_progress_on=chatbots, **COMPUTES
    )
    box.stop(stopped, conversations, [*chatbots, box], cancels=[asked], **AT_ONCE)
    clear.click(
        lambda: (((), ()), [], [], "&nbsp;", "&nbsp;", box_update(running=False)),
        None, outputs, cancels=[asked], **AT_ONCE,
    )  # fmt: skip
