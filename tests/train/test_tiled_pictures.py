"""Training on tiles computes what the stock LLaVA-NeXT model does."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration

from mllm.images import with_images
from mllm.prompts import ChatPrompts
from train import run_recipe
from train.dry_run_instruction import dry_run
from train.estimate import estimate
from train.features import TowerFeatures
from train.instruction_data import collate
from train.instruction_model import InstructionModel
from train.instruction_rows import InstructionSample, RowLimits, chat_row
from train.parts import parts_of
from train.pictures import PixelValues
from train.recipe import InstructionRecipe, InstructionSource, TowerTraining
from train.sources.base import InstructionData
from train.tiled_pictures import TiledPictures

SIZES = [(100, 40), (30, 30), (40, 90)]
SAMPLES = [
    InstructionSample((0,), (("what is it?", "red"),)),
    InstructionSample((2, 1), (("what color?", "two"),)),
    InstructionSample((), (("hello?", "yes"),)),
]


def picture(key: int) -> Image.Image:
    width, height = SIZES[key]
    generator = np.random.default_rng(key)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def tiled(mllm: Any) -> tuple[Any, Any]:
    return with_images(*mllm, mode="tiles", grid=((1, 2), (2, 1)))


@pytest.fixture
def data() -> InstructionData:
    openers = [lambda key=key: picture(key) for key in range(3)]  # type: ignore[misc]
    return InstructionData(SAMPLES, openers, [f"tiled test {key}" for key in range(3)])


def stock_loss(model: Any, processor: Any, rows: list[Any]) -> torch.Tensor:
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.from_numpy(row.input_ids)[None]
        labels = torch.full_like(ids, -100)
        labels[0, torch.from_numpy(row.label_positions) + 1] = torch.from_numpy(row.labels)
        images = [picture(key) for key in row.image_keys]
        shown = processor.image_processor(images=images, return_tensors="pt") if images else {}
        loss = model(
            input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), **shown
        ).loss
        total, count = total + loss * len(row.labels), count + len(row.labels)
    return total / count


@pytest.mark.parametrize("tower_trains", [False, True])
def test_loss_is_that_of_the_stock_model(
    tiled: Any, data: InstructionData, tower_trains: bool, tmp_path: Path
) -> None:
    model, processor = tiled
    pictures = TiledPictures(model, processor, data)
    limits = RowLimits(model.config.image_token_id, pictures.num_tokens)
    prompts = ChatPrompts(processor, 0)
    rows = [chat_row(sample, prompts, limits) for sample in SAMPLES]
    views: Any = (
        PixelValues(pictures.open_views, pictures.processor)
        if tower_trains
        else TowerFeatures(
            model.model.vision_tower, pictures.processor, pictures.open_views,
            pictures.identities, dtype="float32", cache=tmp_path,
        )
    )  # fmt: skip
    batch = collate(rows, pictures.shown_by(views), pad_token_id=2)
    loss = InstructionModel(model)(**batch)["loss"]
    # Measured worst: 2e-7 of a loss of 10.
    torch.testing.assert_close(loss, stock_loss(model, processor, rows), rtol=1e-5, atol=0)


def test_separator_is_part_of_the_connector(tiled: Any) -> None:
    assert parts_of(tiled[0])["model.image_newline"] == "connector"


def test_separator_stays_in_the_graph_of_a_text_only_batch(
    tiled: Any, data: InstructionData
) -> None:
    model, processor = tiled
    pictures = TiledPictures(model, processor, data)
    limits = RowLimits(model.config.image_token_id, pictures.num_tokens)
    row = chat_row(SAMPLES[2], ChatPrompts(processor, 0), limits)
    shown = pictures.shown_by(PixelValues(pictures.open_views, pictures.processor))
    InstructionModel(model)(**collate([row], shown, 2))["loss"].backward()
    assert model.model.image_newline.grad is not None


@pytest.fixture
def tiled_recipe(llm_folder: Path, clip_folder: Path, tmp_path: Path) -> InstructionRecipe:
    records = []
    for key in range(3):
        picture(key).save(tmp_path / f"{key}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
        records.append({"image": f"{key}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return InstructionRecipe(
        out=str(tmp_path / "out"),
        llm=str(llm_folder),
        tower=str(clip_folder),
        images="tiles",
        image_grid=[(1, 2), (2, 1)],
        data=[InstructionSource(name="llava_json", path=str(tmp_path / "data.json"))],
        batch_rows=2,
        steps=2,
        precision="fp32",
    )


def test_recipe_with_tiles_gives_a_stock_model(tiled_recipe: InstructionRecipe) -> None:
    folder = run_recipe(tiled_recipe)
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.image_grid_pinpoints == [[32, 64], [64, 32]]


@pytest.mark.parametrize("tower", ["frozen", "full"])
def test_plan_counts_the_tokens_and_parameters_of_the_run(
    tiled_recipe: InstructionRecipe, tower: Literal["frozen", "full"]
) -> None:
    tiled_recipe.trainable.vision = TowerTraining(mode=tower)
    lines = list(dry_run(tiled_recipe))
    planned = estimate(tiled_recipe)
    log = json.loads((run_recipe(tiled_recipe) / "training_log.json").read_text())
    assert "32 px and up to 2 tiles as large" in lines[0]
    assert any(f"{log['steps']} steps, {log['num_tokens']} tokens" in line for line in lines)
    assert planned.num_parameters == log["num_parameters"]


def test_larger_tiles_take_more_memory(tiled_recipe: InstructionRecipe) -> None:
    tiled_recipe.image_grid = [(1, 1)]
    few = estimate(tiled_recipe)
    tiled_recipe.image_grid = [(3, 3)]
    many = estimate(tiled_recipe)
    assert many.flops > 3 * few.flops
    assert many.activations > 2 * few.activations
