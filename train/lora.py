"""Low-rank adapters inside a part of the model, to be merged into its weights at the end."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from train.recipe import PartTraining
from vision_moe import InputError

if TYPE_CHECKING:
    import peft


def inject_lora(
    module: nn.Module,
    part: str,
    settings: PartTraining,
    seed: int,
    belongs: Callable[[str], bool] | None = None,
    beside: "peft.LoraModel | None" = None,
) -> "peft.LoraModel":
    """Put adapters into ``module``, in place, and freeze all else of it.

    Args:
        module: A language model without its head, a tower, a connector.
        part: Names the adapter, and the recipe's key in errors.
        settings: Rank, scale, dropout and which layers.
        seed: Of the adapters' initial weights.
        belongs: Which layers of ``module`` are the part's, by qualified name; all by default.
        beside: What holds the adapters of another part of ``module``.

    Returns:
        What ``merge_and_unload()`` is called on; not a part of the model.
    """
    # bitsandbytes, which peft imports, warns of an optional package that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import peft
    from peft.tuners.lora import LoraLayer

    target: str | list[str] = settings.target
    parameters: list[str] = []
    if belongs is not None:
        chosen = {
            name: layer
            for name, layer in module.named_modules()
            if belongs(name) and _is_chosen(name, settings.target)
        }
        # PyTorch's own attention holds its three projections as one bare parameter. Its output
        # projection is no layer that is called, so that it has no adapter.
        attentions = [n for n, layer in chosen.items() if isinstance(layer, nn.MultiheadAttention)]
        parameters = [f"{name}.in_proj_weight" for name in attentions]
        # Experts in one stack, as transformers' mixtures hold them: (E, in, out) or (E, out, in).
        parameters += [
            f"{name}.{own}"
            for name, layer in chosen.items()
            for own, parameter in layer.named_parameters(recurse=False)
            if parameter.ndim == 3 and not isinstance(layer, nn.MultiheadAttention)
        ]
        target = [
            name
            for name, layer in chosen.items()
            if isinstance(layer, nn.Linear) and name.rpartition(".")[0] not in attentions
        ]
        if not target and not parameters:
            raise InputError(f"'trainable.{part}.target': {settings.target} names no layer of it")
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=target,
        target_parameters=parameters or None,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if beside is None:
                adapted = peft.LoraModel(module, config, part)
            else:
                adapted = beside
                adapted.peft_config[part] = config
                adapted.inject_adapter(module, part)
    except ValueError as error:
        raise InputError(f"'trainable.{part}.target': {error}") from error
    # Each layer has one adapter, that of its part; peft has just put all others to sleep.
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(list(layer.r))  # type: ignore[attr-defined]
    return adapted


def _is_chosen(name: str, target: str | list[str]) -> bool:
    return target == "all-linear" or any(f".{name}".endswith(f".{one}") for one in target)
