"""The tiny MLLM behind a page; its answers are long, so that there is something to stop."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor

from demo import DemoOptions
from demo.loading import Models
from demo.serving import RunningDemo, start_demo
from mllm.chat import ChatModel
from mllm.model import build_llava


@pytest.fixture(scope="session")
def chat_model(llm_folder, _clip) -> ChatModel:
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    language_model = AutoModelForCausalLM.from_pretrained(llm_folder)
    with torch.no_grad():  # the end of a turn is never likely
        language_model.get_input_embeddings().weight[:3] = 0
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    tower = copy.deepcopy(_clip).to_vision_model()
    return ChatModel(*build_llava(language_model, tokenizer, tower, processor))


@pytest.fixture(scope="session")
def models(chat_model, _clip) -> Models:
    return Models(
        chat=chat_model,
        chat_name="tiny",
        compare=chat_model,
        compare_name="other",
        clips={"Dense CLIP": _clip, "CLIP-MoE": _clip},
    )


@pytest.fixture(scope="session")
def demo(models) -> RunningDemo:
    options = DemoOptions(
        "tiny", max_new_tokens=128, max_image_pixels=4_000_000, max_upload_megabytes=3
    )
    with start_demo(options, models) as running:
        yield running


@pytest.fixture(scope="session")
def photo(tmp_path_factory) -> Path:
    image = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill="red")
    file = tmp_path_factory.mktemp("photos") / "photo.jpg"
    image.save(file)
    return file
