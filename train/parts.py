"""The parts of an MLLM that a recipe freezes, adapts or trains.

    connector   llm   llm_router   vision   router   experts

Every parameter belongs to one of them.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from train.lora import inject_lora
from train.quantize import merge_dequantized, num_elements
from train.recipe import PartTraining, Trainable
from vision_moe import InputError, moe_layers

if TYPE_CHECKING:
    import peft

logger = logging.getLogger(__name__)

PARTS = ("connector", "llm", "llm_router", "vision", "router", "experts")

_SEPARATOR = "model.image_newline"  # that of a model that is shown tiles
_TOWER, _CONNECTOR = "model.vision_tower.", "model.multi_modal_projector."


@dataclass
class TrainableParts:
    """What :func:`set_trainable` made: parameters by part, and the adapters to merge at the end.

    Attributes:
        parameters: Those that train; a part that is frozen is absent.
        num_parameters: ``{part: {"total", "trained"}}``; a part that the model lacks is absent.
        adapters: By part.
        unread: Parameters of the tower that its features do not depend on; frozen.
    """

    parameters: dict[str, list[nn.Parameter]]
    num_parameters: dict[str, dict[str, int]]
    adapters: "dict[str, peft.LoraModel]" = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)

    def merge(self) -> None:
        """Add the adapters to the weights that they adapt; the model is then a plain one."""
        if (llm := self.adapters.get("llm")) is not None:
            merge_dequantized(llm.model, "llm")
        # Parts of the tower share one.
        for adapted in {id(one): one for one in self.adapters.values()}.values():
            adapted.merge_and_unload()
        self.adapters = {}


def set_trainable(
    model: LlavaForConditionalGeneration, trainable: Trainable, seed: int = 0
) -> TrainableParts:
    """Freeze all but what the recipe names, and log what that leaves.

    LoRA stays out of the language model's head. Blocks of the tower whose output nobody reads stay
    frozen. ``seed`` is of the adapters.
    """
    model.requires_grad_(False)
    part_of = parts_of(model)
    unread = _unread_by_connector(model) if trainable.tower_trains else set()
    adapters: dict[str, peft.LoraModel] = {}
    for part in PARTS:
        settings: PartTraining = getattr(trainable, part)
        present = part in part_of.values()
        if settings.mode != "frozen" and not present:
            raise InputError(f"'trainable.{part}' trains, but the model has no such part")
        if settings.mode == "lora":
            adapters[part] = _adapt(model, part, settings, seed, part_of, unread, adapters)
    for name, parameter in model.named_parameters():
        part = _part_of_parameter(name, part_of)
        settings = getattr(trainable, part)
        is_adapter = ".lora_" in name
        # peft has frozen what it did not make.
        parameter.requires_grad_(
            is_adapter or (settings.mode == "full" and name not in unread)
        )
    return _count(model, part_of, adapters, unread)


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, str]:
    """The part of every parameter, by its qualified name in the model without adapters."""
    tower_moe = {f"{_TOWER}{name}" for name in moe_layers(model.model.vision_tower)}
    routers = {f"model.language_model.{name}" for name in router_names(model.model.language_model)}
    part_of = {}
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        if name.startswith(_CONNECTOR) or name == _SEPARATOR:
            part_of[name] = "connector"
        elif not name.startswith(_TOWER):
            part_of[name] = "llm_router" if module in routers else "llm"
        elif any(
            name.startswith((f"{layer}.router.", f"{layer}.base_gate.", f"{layer}.expert_bias"))
            for layer in tower_moe
        ):
            part_of[name] = "router"
        elif any(name.startswith(f"{layer}.") for layer in tower_moe):
            part_of[name] = "experts"
        else:
            part_of[name] = "vision"
    return part_of


def router_names(language_model: nn.Module) -> list[str]:
    """Routers of a mixture language model, first block first; none of a dense one."""
    recorder: Any = (getattr(language_model, "_can_record_outputs", None) or {}).get(
        "router_logits"
    )
    if recorder is None:
        return []
    kind = getattr(recorder, "target_class", recorder)
    return [name for name, module in language_model.named_modules() if isinstance(module, kind)]


def _part_of_parameter(name: str, part_of: dict[str, str]) -> str:
    """Adapters and what they wrap have longer names than the parameter they stand for."""
    if name in part_of:
        return part_of[name]
    return part_of[original_name(name, part_of)]


def original_name(name: str, known: Iterable[str]) -> str:
    """``x.base_layer.weight`` and ``x.lora_A.llm.weight`` are ``x.weight`` of the plain model."""
    stem = name.partition(".base_layer.")[0].partition(".lora_")[0] + "."
    return next(one for one in known if one.startswith(stem))


def _adapt(
    model: LlavaForConditionalGeneration,
    part: str,
    settings: PartTraining,
    seed: int,
    part_of: dict[str, str],
    unread: set[str],
    adapters: "dict[str, peft.LoraModel]",
) -> "peft.LoraModel":
    if part == "llm":
        language_model = model.model.language_model
        routers = set(router_names(language_model))
        # peft knows what "all-linear" is of a dense model; of a mixture it would adapt the routers.
        own_choice = routers and settings.target == "all-linear"
        return inject_lora(
            language_model,
            part,
            settings,
            seed,
            (lambda name: name not in routers) if own_choice else None,
        )
    if part == "connector":
        root: nn.Module = model.model.multi_modal_projector
        prefix = _CONNECTOR
    elif part == "llm_router":
        raise InputError("'trainable.llm_router' is frozen or full: its routers are no layers")
    else:
        root, prefix = model.model.vision_tower, _TOWER

    def belongs(layer: str) -> bool:
        names = [name for name in part_of if name.startswith(f"{prefix}{layer}.")]
        return any(part_of[name] == part and name not in unread for name in names)

    beside = next((one for one in adapters.values() if one.model is root), None)
    return inject_lora(root, part, settings, seed, belongs, beside)


def _unread_by_connector(model: LlavaForConditionalGeneration) -> set[str]:
    """Parameters of the tower that its features do not depend on: blocks after the layer read.

    They would get no gradient, which data-parallel training waits for.
    """
    tower: Any = model.model.vision_tower
    parameters = dict(tower.named_parameters())
    size = tower.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    weight = next(iter(parameters.values()))
    blank = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
    tower.requires_grad_(True)
    layers = model.config.vision_feature_layer
    with torch.enable_grad():
        states = tower(blank, output_hidden_states=True).hidden_states
        read = [states[one] for one in ([layers] if isinstance(layers, int) else layers)]
        grads = torch.autograd.grad(
            [one.sum() for one in read], list(parameters.values()), allow_unused=True
        )
    tower.requires_grad_(False)
    return {
        f"{_TOWER}{name}"
        for name, gradient in zip(parameters, grads, strict=True)
        if gradient is None
    }


def _count(
    model: LlavaForConditionalGeneration,
    part_of: dict[str, str],
    adapters: "dict[str, peft.LoraModel]",
    unread: set[str],
) -> TrainableParts:
    counts = {part: {"total": 0, "trained": 0} for part in PARTS if part in part_of.values()}
    parameters: dict[str, list[nn.Parameter]] = {}
    # A head that is tied to the embeddings is one parameter, and is named once.
    for name, parameter in model.named_parameters():
        part = _part_of_parameter(name, part_of)
        counts[part]["total"] += num_elements(parameter)
        if parameter.requires_grad:
            counts[part]["trained"] += parameter.numel()
            parameters.setdefault(part, []).append(parameter)
    for part, count in counts.items():
        logger.info(
            "%s: %s of %s parameters train", part, f"{count['trained']:,}", f"{count['total']:,}"
        )
    if not parameters:
        raise InputError("the recipe trains nothing: every part of 'trainable' is frozen")
    return TrainableParts(parameters, counts, adapters, unread)
