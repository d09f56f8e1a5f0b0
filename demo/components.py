"""Gradio components with what the tabs share: settings, uploads that nothing decodes, examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from demo.options import DemoOptions
from demo.pictures import EXTENSIONS
from mllm.chat import Sampling
from mllm.easy_vqa import EasyVQA

# Pictures of easy-VQA's test split that show different shapes, with a question for each.
_EXAMPLES = {
    0: "what shape is in the image?",
    3: "what color is the shape?",
    5: "is there a circle in the image?",
    8: "does the image contain a red shape?",
}
_EXAMPLE_SIDE = 256
_SOURCES = ("upload", "webcam", "clipboard")


def picture_input(label: str, sources: Sequence[str] = _SOURCES, **options: Any) -> gr.Image:
    """A picture from a file, the clipboard or the camera.

    Its events are to be declared with ``preprocess=False``, and their functions to ask
    :func:`path_of`: Gradio would decode the file itself, before :mod:`demo.pictures` sees it.
    """
    return gr.Image(label=label, type="filepath", sources=list(sources), **options)  # type: ignore[arg-type]


def path_of(payload: dict[str, Any] | None) -> str | None:
    """The uploaded file of a :func:`picture_input`."""
    return payload["path"] if payload else None


def question_box(label: str, max_new_lines: int = 8) -> gr.MultimodalTextbox:
    """A question with its pictures: Enter sends, Shift-Enter is a new line."""
    return gr.MultimodalTextbox(
        label=label,
        show_label=False,
        placeholder="Add, paste or drop pictures, and ask",
        file_count="multiple",
        file_types=EXTENSIONS,
        sources=["upload"],
        max_lines=max_new_lines,
        # Pasted text stays text: Gradio would turn a long one into a file.
        max_plain_text_length=10_000_000,
    )


@dataclass(frozen=True)
class SamplingControls:
    """Sliders, and the sampling that their values mean."""

    inputs: list[gr.components.Component]

    @staticmethod
    def build(options: DemoOptions) -> SamplingControls:
        with gr.Accordion("Answer settings", open=False), gr.Row():
            return SamplingControls(
                [
                    gr.Slider(0, 2, 0.2, step=0.05, label="Temperature",
                              info="0: always the likeliest word"),
                    gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p",
                              info="Draw from the likeliest words with this share"),
                    gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty",
                              info="1: none"),
                    gr.Slider(1, options.max_new_tokens, min(128, options.max_new_tokens), step=1,
                              label="Longest answer", info="Tokens"),
                    gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1,
                              info="The same seed draws the same answer"),
                ]
            )  # fmt: skip


def sampling_of(options: DemoOptions, *values: float | None) -> Sampling:
    """The values of :class:`SamplingControls`, or of the API, kept within their limits."""
    defaults = (0.2, 0.9, 1.0, 128, 0)
    temperature, top_p, penalty, longest, seed = (
        default if value is None else value for value, default in zip(values, defaults, strict=True)
    )
    return Sampling(
        temperature=min(max(float(temperature), 0.0), 2.0),
        top_p=min(max(float(top_p), 0.05), 1.0),
        repetition_penalty=min(max(float(penalty), 1.0), 2.0),
        max_new_tokens=min(max(int(longest), 1), options.max_new_tokens),
        seed=min(max(int(seed), 0), 2**31 - 1),
    )


def write_examples(folder: Path) -> list[tuple[str, str]]:
    """Example pictures, as files below ``folder``, each with a question."""
    folder.mkdir(parents=True, exist_ok=True)
    data = EasyVQA("test")
    examples = []
    for image_id, question in _EXAMPLES.items():
        file = folder / f"example_{image_id}.png"
        with Image.open(data.image_path(image_id)) as image:
            large = image.convert("RGB").resize((_EXAMPLE_SIDE,) * 2, Image.Resampling.LANCZOS)
        large.save(file)
        examples.append((str(file), question))
    return examples
