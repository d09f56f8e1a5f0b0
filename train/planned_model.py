"""The model that a recipe would train, on the meta device: shapes without memory.

S = T*K pairs of token and expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from mllm.building import build_llava, with_connector
from mllm.chat_template import set_chat_template
from mllm.images import with_images
from mllm.llm import EMBEDDED_LLM, embedded_llm_folder
from train.config import load_recipe, shipped_recipes
from train.known_models import known_llm, known_tower
from train.recipe import InstructionRecipe
from vision_moe import InputError
from vision_moe.dispatch import SortedPairs, sort_by_expert


@dataclass
class PlannedModel:
    """A model without weights.

    Attributes:
        model: On the meta device.
        processor: Its processor.
        counts_tokens: Whether its tokenizer is the model's own, not one that stands for it.
        notes: What was assumed.
    """

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    counts_tokens: bool = True
    notes: list[str] = field(default_factory=list)


def planned_model(recipe: InstructionRecipe) -> PlannedModel:
    """Build what :func:`train.starting_model.load_model` would load.

    Raises:
        InputError: A model that the recipe names is neither here, nor on a hub that can be reached,
            nor one whose architecture is known; or its parts do not fit.
    """
    with even_routing():
        successor = recipe.init_from is not None
        planned = _planned_successor(recipe) if successor else _planned_from_parts(recipe)
        with torch.device("meta"):
            planned.model, planned.processor = with_images(
                planned.model, planned.processor, recipe.images, recipe.image_size,
                recipe.image_grid, recipe.seed,
            )  # fmt: skip
        return planned


def _planned_from_parts(recipe: InstructionRecipe) -> PlannedModel:
    if recipe.tower is None:
        raise InputError("the recipe names neither a 'tower' nor an 'init_from'")
    notes: list[str] = []
    llm_config, tokenizer = _llm(recipe, notes)
    tower_config, image_processor = _tower(recipe.tower, notes)
    # A model's own number of embeddings may be larger than its tokenizer's.
    stand_in = tokenizer or _tokenizer_of_size(llm_config.vocab_size)
    with torch.device("meta"):
        model, processor = build_llava(
            AutoModelForCausalLM.from_config(llm_config),
            stand_in,
            _meta_tower(tower_config),
            image_processor,
            vision_feature_layer=recipe.vision_feature_layer,
            vision_feature_select_strategy=recipe.vision_feature_select_strategy,
            connector=recipe.connector,
        )
    return PlannedModel(model, processor, tokenizer is not None, notes)


def _planned_successor(recipe: InstructionRecipe) -> PlannedModel:
    source = recipe.init_from
    assert source is not None
    if Path(source).is_dir():
        try:
            config = AutoConfig.from_pretrained(source)
            processor = AutoProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise InputError(f"'init_from' {source}: {_first_line(error)}") from error
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        planned = PlannedModel(model, processor)
    else:
        earlier = _recipe_that_makes(source)
        planned = planned_model(earlier)
        planned.notes.append(f"{source} is not there yet: planned as its recipe makes it")
    if recipe.tower is not None:
        tower_config, _ = _tower(recipe.tower, planned.notes)
        planned.model.model.vision_tower = _meta_tower(tower_config)
    if recipe.connector is not None:
        planned.model = with_connector(planned.model, planned.processor, recipe.connector)
    return planned


def _recipe_that_makes(folder: str) -> InstructionRecipe:
    for name in shipped_recipes():
        recipe = load_recipe(name)
        if isinstance(recipe, InstructionRecipe) and Path(recipe.out) == Path(folder):
            return recipe
    raise InputError(f"'init_from' {folder}: there is no such folder, and no recipe that makes it")


def _llm(
    recipe: InstructionRecipe, notes: list[str]
) -> tuple[PreTrainedConfig, Any | None]:
    name = recipe.llm
    if name in ("embedded", EMBEDDED_LLM):
        name = str(embedded_llm_folder())
    known = known_llm(name)
    # What is known is not fetched for a plan.
    offline = {"local_files_only": True} if known else {}
    try:
        config = AutoConfig.from_pretrained(name, **offline)
        tokenizer = AutoTokenizer.from_pretrained(name, **offline)
    except (OSError, ValueError) as error:
        if known is None:
            raise InputError(f"language model '{name}': {_first_line(error)}") from error
        notes.append(f"{name} is not on this machine: dimensions as published, tokens not counted")
        return known, None
    if recipe.chat_template is not None:
        set_chat_template(tokenizer, recipe.chat_template)
    return config, tokenizer


def _tower(name: str, notes: list[str]) -> tuple[PreTrainedConfig, Any]:
    known = known_tower(name)
    offline = {"local_files_only": True} if known else {}
    try:
        config = AutoConfig.from_pretrained(name, **offline)
        processor = AutoImageProcessor.from_pretrained(name, **offline)
        return getattr(config, "vision_config", config), processor
    except (OSError, ValueError) as error:
        if known is None:
            raise InputError(f"'{name}': no vision tower ({_first_line(error)})") from error
    notes.append(f"{name} is not on this machine: dimensions as published")
    side = known.image_size
    return known, CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)


def _meta_tower(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        if isinstance(config, CLIPVisionConfig):
            return CLIPVisionModel(config)
        return AutoModel.from_config(config)


def _tokenizer_of_size(size: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(number): number for number in range(size)}, "0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template="{{ messages }}")


class _Counts(list[int]):
    """Numbers that can be read, unlike those of a tensor without content."""

    def tolist(self) -> list[int]:
        return self


@contextmanager
def even_routing() -> Iterator[None]:
    """Without values there is no routing: every expert gets its share, as training aims for."""

    def even(chosen: Tensor, num_experts: int) -> SortedPairs:
        pairs = sort_by_expert(chosen, num_experts)
        share, rest = divmod(chosen.numel(), num_experts)
        counts: Any = _Counts(share + (expert < rest) for expert in range(num_experts))
        return SortedPairs(pairs.order, pairs.token, pairs.expert, counts, pairs.place)

    with (
        patch("vision_moe.dispatch.sort_by_expert", even),
        patch("vision_moe.dispatch._is_groupable", lambda *_: False),
    ):
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
