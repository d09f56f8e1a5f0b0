"""The MLLM that a run starts from, in the precision that the recipe gives its parts."""

import dataclasses
import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

from mllm.building import correct_token_count, with_connector
from mllm.chat_template import multimodal_chat_template, set_chat_template
from mllm.images import with_images
from mllm.llm import EMBEDDED_LLM, load_llm
from mllm.model import build_llava, load_mllm, load_vision_tower, replace_vision_tower
from train.checkpoints import put_weights
from train.parts import TrainableParts, set_trainable
from train.quantize import quantize_nf4
from train.recipe import InstructionRecipe
from vision_moe import InputError

logger = logging.getLogger(__name__)


def load_model(
    recipe: InstructionRecipe,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The MLLM that training starts from: an earlier one, or a new connector between two models."""
    if recipe.init_from is not None:
        model, processor = load_mllm(recipe.init_from)
        stated, computed = correct_token_count(model, processor)
        if stated != computed:
            logger.warning(
                "%s: states %s tokens for a picture, and computes %s; the latter are used",
                *(recipe.init_from, stated, computed),
            )
        if recipe.tower is not None:
            replace_vision_tower(model, recipe.tower, processor)
        if recipe.connector is not None:
            model = with_connector(model, processor, recipe.connector, recipe.seed)
        if recipe.chat_template is not None:
            set_chat_template(processor.tokenizer, recipe.chat_template, may_grow=False)
            processor.chat_template = multimodal_chat_template(processor.tokenizer.chat_template)
    else:
        assert recipe.tower is not None
        llm_name = EMBEDDED_LLM if recipe.llm == "embedded" else recipe.llm
        tower = load_vision_tower(recipe.tower)
        small = recipe.frozen_precision == "bf16" and recipe.trainable.llm.mode != "full"
        llm, tokenizer = load_llm(
            llm_name,
            dtype=torch.bfloat16 if small else torch.float32,
            chat_template=recipe.chat_template,
        )
        model, processor = build_llava(
            llm,
            tokenizer,
            tower,
            AutoImageProcessor.from_pretrained(recipe.tower),
            vision_feature_layer=recipe.vision_feature_layer,
            vision_feature_select_strategy=recipe.vision_feature_select_strategy,
            seed=recipe.seed,
            connector=recipe.connector,
        )
    model, processor = with_images(
        model, processor, recipe.images, recipe.image_size, recipe.image_grid, recipe.seed
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.llm_quantization == "nf4":
        quantize_nf4(model.model.language_model, device)
        _leave_file(model)
    model.to(device)  # type: ignore[arg-type]
    return model, processor


def _leave_file(model: LlavaForConditionalGeneration) -> None:
    """Give every weight memory of its own.

    On a CPU they are parts of a mapped file, and as long as one is, all of the file's pages that
    were read stay in the process: those of the layers, too, that now are in four bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if getattr(tensor, "quant_state", None) is None:
            tensor.data = tensor.data.clone()


def set_parts(recipe: InstructionRecipe, model: LlavaForConditionalGeneration) -> TrainableParts:
    """Freeze and adapt what the recipe says; what trains is fp32, the rest as the recipe says.

    Raises:
        InputError: The recipe trains nothing, or what cannot train.
    """
    if recipe.llm_quantization != "none" and recipe.trainable.llm.mode == "full":
        raise InputError("'trainable.llm' is full: weights in four bits are frozen or lora")
    parts = set_trainable(model, recipe.trainable, recipe.seed)
    frozen = torch.bfloat16 if recipe.frozen_precision == "bf16" else torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():
            kind = torch.float32 if parameter.requires_grad else frozen
            parameter.data = parameter.data.to(kind)
    return parts


def finished_model(
    recipe: InstructionRecipe, state: Mapping[str, Tensor], source: str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model that a run ends with, adapters merged.

    Args:
        recipe: Of the run.
        state: The weights that a checkpoint holds, by name in the LLaVA model.
        source: Where they are from, for errors.
    """
    if recipe.trainable.llm.mode == "frozen":
        # What was only read is handed on as it came, not as it looked in four bits.
        recipe = dataclasses.replace(recipe, llm_quantization="none")
    model, processor = load_model(recipe)
    parts = set_parts(recipe, model)
    put_weights(model, state, source)
    parts.merge()
    return model.eval(), processor


