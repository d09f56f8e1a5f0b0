"""Low-rank adapters inside a language model, to be merged into its weights at the end."""

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from train.recipe import LLMTraining
from vision_moe import InputError

if TYPE_CHECKING:
    import peft


def inject_lora(language_model: nn.Module, settings: LLMTraining, seed: int) -> "peft.LoraModel":
    """Put adapters into ``language_model``, in place, and freeze all else of it.

    Args:
        language_model: Without its head.
        settings: Rank, scale, dropout and which layers.
        seed: Of the adapters' initial weights.

    Returns:
        What ``merge_and_unload()`` is called on; not a part of the model.
    """
    # bitsandbytes, which peft imports, warns of an optional package that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import peft

    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.target,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return peft.LoraModel(language_model, config, "default")
    except ValueError as error:
        raise InputError(f"'trainable.llm.target': {error}") from error
