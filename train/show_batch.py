"""``mllm train RECIPE --show-batch N``: the first samples as the model reads them.

What is learnt is green, what is masked is dim, a picture is one blue word.
"""

from collections.abc import Iterator
from itertools import groupby

import click
import numpy as np
from transformers import PreTrainedTokenizerBase

from train.instruction import build_rows, picture_inputs
from train.instruction_rows import PREFIX, Row
from train.instruction_sources import load_sources
from train.recipe import InstructionRecipe, Recipe
from train.row_store import RowStore
from train.starting_model import load_model
from vision_moe import InputError


def learnt_tokens(row: Row) -> np.ndarray:
    """``(L,)`` bool: which tokens are labels."""
    num_prefix = int((row.branch_ids == PREFIX).sum())
    learnt = np.zeros(len(row), dtype=bool)
    number = 0  # labels stand in the order of their tokens
    for place, token in enumerate(row.input_ids):
        starts_branch = place == 0 or row.branch_ids[place] != row.branch_ids[place - 1]
        previous = num_prefix - 1 if starts_branch and place else place - 1
        if (
            number < len(row.labels)
            and row.label_positions[number] == previous
            and row.labels[number] == token
        ):
            learnt[place] = True
            number += 1
    assert number == len(row.labels)
    return learnt


def render_row(row: Row, tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> str:
    """The row's text in ANSI colours, a line for each branch after the prefix."""
    learnt = learnt_tokens(row)
    kinds = [
        (int(branch), bool(is_learnt), bool(token == image_token_id))
        for branch, is_learnt, token in zip(row.branch_ids, learnt, row.input_ids, strict=True)
    ]
    parts: list[str] = []
    place, branch_before = 0, PREFIX
    for (branch, is_learnt, is_image), group in groupby(kinds):
        count = len(list(group))
        if branch != branch_before:
            parts.append("\n" + click.style(f"-- branch {branch} --", dim=True) + "\n")
            branch_before = branch
        if is_image:
            parts.append(click.style(f"[picture: {count} tokens]", fg="blue"))
        else:
            text = _printable(str(tokenizer.decode(row.input_ids[place : place + count])))
            parts.append(click.style(text, fg="green" if is_learnt else None, dim=not is_learnt))
        place += count
    return "".join(parts)


def show_batch(recipe: Recipe, count: int) -> Iterator[str]:
    """Lines that show the first ``count`` samples of a recipe, and the sum of all.

    Raises:
        InputError: It is no recipe of an MLLM, or something of it is not there.
    """
    if not isinstance(recipe, InstructionRecipe):
        raise InputError("--show-batch is for recipes of kind 'instruction'")
    model, processor = load_model(recipe)
    data = load_sources(recipe.data, recipe.seed)
    _, num_image_tokens = picture_inputs(recipe, model, processor, data)
    rows = build_rows(recipe, model, processor, data.samples, num_image_tokens)
    yield from describe_rows(rows, processor.tokenizer, model.config.image_token_id, count)
    data.skipped.report()


def describe_rows(
    rows: RowStore, tokenizer: PreTrainedTokenizerBase, image_token_id: int, count: int
) -> Iterator[str]:
    """A heading and the text of each of the first ``count`` rows, and what they have in common."""
    for number, row in enumerate(rows[:count]):
        heading = (
            f"row {number}: {len(row):,} tokens, {len(row.labels):,} learnt,"
            f" pictures {list(row.image_keys)}"
        )
        if row.num_cut:
            heading += f", {row.num_cut:,} tokens cut off"
        yield click.style(heading, bold=True)
        yield render_row(row, tokenizer, image_token_id)
    tokens, labels = sum(rows.lengths), sum(len(row.labels) for row in rows)
    legend = f"{click.style('learnt', fg='green')}, {click.style('masked', dim=True)}"
    yield (
        f"{len(rows):,} rows, {tokens:,} tokens, {labels:,} learnt ({labels / tokens:.1%}):"
        f" {legend}"
    )


def _printable(text: str) -> str:
    """A stranger's control characters could rewrite the terminal."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode()
        for one in text
    )
