"""What ``mllm bench train`` trains on: data that a LLaVA user would bring, and models to fit.

instruction   easy-VQA, all questions of a picture; SmolLM2 + LoRA, the quickstart's small tower
chat          conversations of 1 to 14 turns, one a picture; the same models
pretrain      captions; a frozen tower of ViT-B/16's size, 196 tokens, and SmolLM2, frozen
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mllm.llm import load_llm
from mllm.model import build_llava, load_mllm, load_vision_tower
from mllm.scenes import ScenesDataset, SceneWorld
from train.recipe import (
    ConnectorTraining,
    InstructionRecipe,
    InstructionSource,
    LLMTraining,
    Precision,
    Trainable,
)
from train.sources.builtin import CAPTION_REQUEST

Part = Literal["instruction", "chat", "pretrain"]
PARTS: tuple[Part, ...] = ("instruction", "chat", "pretrain")

# Turns of a conversation: most are short, and a batch holds one of the long ones.
_NUM_TURNS = (1, 1, 2, 3, 4, 6, 9, 14)
_TOWERS: dict[Part, dict[str, int]] = {
    "instruction": {"width": 256, "layers": 4, "heads": 4, "image_size": 64},
    "chat": {"width": 256, "layers": 4, "heads": 4, "image_size": 64},
    "pretrain": {"width": 768, "layers": 12, "heads": 12, "image_size": 224},
}
BATCH_ROWS: dict[Part, int] = {"instruction": 4, "chat": 8, "pretrain": 8}


def write_conversations(part: Part, folder: Path, num_images: int, seed: int) -> Path:
    """LLaVA's JSON with pictures beside it, for ``chat`` and ``pretrain``."""
    size = _TOWERS[part]["image_size"]
    scenes = ScenesDataset(SceneWorld(), "train", num_images, seed, image_size=size)
    rng = np.random.default_rng([seed, num_images])
    records = []
    for index in range(num_images):
        scene = scenes[index]
        scene.image.save(folder / f"{index}.png")
        turns = [(CAPTION_REQUEST, scene.detailed_caption)]
        if part == "chat":
            asked = [(one.text, one.answer) for one in scene.questions]
            order = rng.permutation(len(asked) * 3)[: int(rng.choice(_NUM_TURNS)) - 1]
            turns += [asked[number % len(asked)] for number in order]
        conversation = [
            {"from": speaker, "value": text}
            for turn in turns
            for speaker, text in zip(("human", "gpt"), turn, strict=True)
        ]
        conversation[0]["value"] = "<image>\n" + conversation[0]["value"]
        records.append({"id": index, "image": f"{index}.png", "conversations": conversation})
    file = folder / f"{part}.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def bench_recipe(
    part: Part, data: InstructionSource, precision: Precision, out: str
) -> InstructionRecipe:
    """What is trained, by both sides."""
    lora = LLMTraining(mode="lora", lr=1e-3, target=["q_proj", "k_proj", "v_proj", "o_proj"])
    return InstructionRecipe(
        out=out,
        data=[data],
        template="plain" if part == "pretrain" else "chat",
        trainable=Trainable(
            connector=ConnectorTraining(lr=1e-3 if part == "pretrain" else 5e-5),
            llm=LLMTraining() if part == "pretrain" else lora,
        ),
        batch_rows=BATCH_ROWS[part],
        precision=precision,
    )


def bench_model(
    part: Part, checkpoint: str | None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An MLLM from a folder, or SmolLM2 with a tower of random weights."""
    if checkpoint is not None and part != "pretrain":
        return load_mllm(checkpoint)
    shape = _TOWERS[part]
    torch.manual_seed(0)
    tower: Any = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=shape["width"],
            intermediate_size=4 * shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            image_size=shape["image_size"],
            patch_size=16,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        tower.save_pretrained(folder)
        tower = load_vision_tower(folder)  # mapped, as one that was trained would be
    side = shape["image_size"]
    image_processor: Any = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return build_llava(*load_llm(), tower, image_processor)
