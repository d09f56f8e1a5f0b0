"""What ``--show-batch`` shows as learnt is what is learnt."""

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from mllm.prompts import ChatPrompts
from train.instruction_rows import InstructionSample, Row, RowLimits, chat_row, plain_row
from train.recipe import ContrastiveRecipe, ContrastiveTraining, InstructionRecipe
from train.recipe import InstructionSource as Source
from train.show_batch import learnt_tokens, render_row, show_batch
from vision_moe import InputError

QUESTIONS = (("what is the color?", "red"), ("how many?", "two"), ("is it blue?", "no one"))


def rows_of(mllm: Any) -> dict[str, Row]:
    model, processor = mllm
    limits = RowLimits(model.config.image_token_id, lambda _: 16)
    prompts = ChatPrompts(processor, 16)
    dialogue = InstructionSample((0,), QUESTIONS, is_dialogue=True)
    return {
        "branches": chat_row(InstructionSample((0,), QUESTIONS), prompts, limits),
        "dialogue": chat_row(dialogue, prompts, limits),
        "plain": plain_row(InstructionSample((0,), QUESTIONS), processor.tokenizer, limits),
        "text": plain_row(InstructionSample((), QUESTIONS[:1]), processor.tokenizer, limits),
    }


@pytest.mark.parametrize("name", ["branches", "dialogue", "plain", "text"])
def test_learnt_tokens_are_the_labels(mllm: Any, name: str) -> None:
    row = rows_of(mllm)[name]
    learnt = learnt_tokens(row)
    np.testing.assert_array_equal(row.input_ids[learnt], row.labels)


def test_answers_are_green_and_the_rest_is_dim(mllm: Any) -> None:
    model, processor = mllm
    shown = render_row(rows_of(mllm)["branches"], processor.tokenizer, model.config.image_token_id)
    for _, answer in QUESTIONS:
        assert click.style(f"{answer}<|im_end|>", fg="green", dim=False) in shown
    assert click.style("[picture: 16 tokens]", fg="blue") in shown
    assert "-- branch 3 --" in shown


def test_control_characters_of_a_stranger_are_shown_as_text(mllm: Any) -> None:
    model, processor = mllm
    sample = InstructionSample((), (("\x1b[2J", "yes"),))
    row = chat_row(sample, ChatPrompts(processor, 16), RowLimits(model.config.image_token_id, len))
    assert "\\x1b[2J" in render_row(row, processor.tokenizer, model.config.image_token_id)


def test_rows_of_a_recipe_are_shown(llm_folder: Path, clip_folder: Path) -> None:
    source = Source(name="scenes_questions", num_images=3, questions_per_image=2, image_size=32)
    recipe = InstructionRecipe(out="", llm=str(llm_folder), tower=str(clip_folder), data=[source])
    lines = list(show_batch(recipe, 2))
    assert [click.unstyle(line)[:6] for line in lines[::2]] == ["row 0:", "row 1:", "3 rows"]


def test_recipe_of_a_clip_has_no_batch_to_show() -> None:
    recipe = ContrastiveRecipe(
        out="", model="ViT-B-32", training=ContrastiveTraining(steps=1, lr=1)
    )
    with pytest.raises(InputError, match="kind 'instruction'"):
        list(show_batch(recipe, 1))
