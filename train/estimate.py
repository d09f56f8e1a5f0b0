"""``mllm estimate RECIPE``: memory and time that a run will need, before it runs.

The model is built without weights, and one step of its largest batch is run on tensors without
content, whose storages are added up. What the process itself takes is measured.

B rows, L padded length, I pictures.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mllm.allocator import heap_holes
from mllm.llm import EMBEDDED_LLM, embedded_llm_folder
from mllm.mapped_files import holds_fp32
from mllm.tiles import is_tiled, num_views
from train.fake import PeakMemory, to_fake
from train.frozen_blocks import FrozenBlock
from train.instruction import RunPlan, build_rows, optimizer_of, plan_run, training_module
from train.instruction_data import collate
from train.instruction_rows import Row
from train.instruction_sources import load_sources
from train.planned_model import PlannedModel, even_routing, planned_model
from train.precision import use_bf16
from train.recipe import InstructionRecipe, Recipe
from train.row_threads import in_one_thread
from train.sources.base import InstructionData
from train.starting_model import set_parts
from train.tiled_pictures import TiledPictures, picture_sizes
from vision_moe import InputError

# A four-bit weight with its doubly quantised scales: 4 bits, one byte for 64 of them, and a
# 32-bit number for each 256 of those bytes.
_NF4_BYTES = 0.5 + (1 + 4 / 256) / 64

# Of a batch: what a step looks into on its way.
_READ = ("row_lengths", "image_sizes")

_GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Bytes, and what a step computes.

    Attributes:
        weights: Of the model.
        gradients: Of what trains.
        optimizer: Its state.
        activations: What else a step holds at its peak.
        heap: What the allocator needs for all that comes and goes beyond it, on a CPU.
        process: What the process takes apart from tensors, on a CPU; 0 where they are elsewhere.
        flops: Of the largest step, forward and backward.
        steps: Optimiser steps; ``None`` where the data or the tokenizer is not there to count.
        seconds: Of all steps, at the speed that this machine multiplies matrices.
        num_parameters: ``{part: {"total", "trained"}}``.
        notes: What was assumed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    heap: int
    process: int
    flops: int
    steps: int | None
    seconds: float | None
    num_parameters: dict[str, dict[str, int]]
    notes: list[str]

    @property
    def total(self) -> int:
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.heap
            + self.process
        )  # fmt: skip

    def table(self) -> str:
        rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("activations of the largest batch", self.activations),
        ]
        if self.heap:
            rows.append(("holes in the allocator's heap", self.heap))
        if self.process:
            rows.append(("the process itself", self.process))
        rows.append(("peak memory of one process", self.total))
        lines = [f"{name:<34}{size / _GB:>9.2f} GB" for name, size in rows]
        lines.append(f"{'largest step':<34}{self.flops / 1e12:>9.2f} TFLOP")
        if self.steps is not None and self.seconds is not None:
            minutes = self.seconds / 60
            lines.append(f"{f'{self.steps:,} steps on this machine':<34}{minutes:>9.1f} minutes")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def estimate(recipe: Recipe) -> Estimate:
    """Estimate a recipe that trains an MLLM.

    Raises:
        InputError: It is of another kind, or something that it names is not there.
    """
    if not isinstance(recipe, InstructionRecipe):
        raise InputError("estimates are for recipes of kind 'instruction'")
    planned = planned_model(recipe)
    try:
        data = load_sources(recipe.data, recipe.seed) if planned.counts_tokens else None
    except InputError as error:
        planned.notes.append(f"the data cannot be read ({error}): the largest batch is assumed")
        data = None
    rows, plan = planned_rows(recipe, planned, data)
    return estimate_step(recipe, planned, rows, plan, data)


def planned_rows(
    recipe: InstructionRecipe, planned: PlannedModel, data: InstructionData | None
) -> tuple[Sequence[Row], RunPlan | None]:
    """The rows that the run would see, if tokenizer and data are there."""
    if not planned.counts_tokens or data is None:
        return [], None
    model, processor = planned.model, planned.processor
    of_views = TiledPictures(model, processor, data).num_tokens if is_tiled(model) else None
    rows = build_rows(recipe, model, processor, data.samples, of_views)
    return rows, plan_run(recipe, rows)


def estimate_step(
    recipe: InstructionRecipe,
    planned: PlannedModel,
    rows: Sequence[Row],
    plan: RunPlan | None,
    data: InstructionData | None,
) -> Estimate:
    """Run the largest step without content; ``rows`` and ``plan`` are of the ``data``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = use_bf16(recipe.precision)
    speed = _flops_per_second(device, bf16)
    # Behind the products, for which libraries are read in that a run needs, too.
    process = psutil.Process().memory_info().rss
    model = planned.model
    if recipe.llm_quantization != "none":
        _mark_four_bits(model.model.language_model)
    with even_routing():
        parts = set_parts(recipe, model)
    packed = _saved_by_four_bits(recipe, model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = to_fake(model, mode, device)
    weights = sum(_size(one) for one in fakes.values())
    trained: Any = {
        part: [fakes[id(one)] for one in ones] for part, ones in parts.parameters.items()
    }
    parts = dataclasses.replace(parts, parameters=trained)
    optimizer = optimizer_of(recipe, parts)
    batch = _largest_batch(recipe, model, rows, plan, data)
    counter: Any = FlopCounterMode(display=False)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    with even_routing(), in_one_thread(), mode, PeakMemory() as memory, counter:
        # Here, as it may keep weights in another format.
        wrapped = training_module(recipe, model, parts).train()
        inputs = {
            name: one if name in _READ else torch.empty_like(one, device=device)
            for name, one in batch.items()
        }
        for _ in range(2):  # the optimiser's state is there from the second step on
            with autocast:
                loss = wrapped(**inputs)["loss"]
            loss.backward()
            del loss
            gradients = sum(_size(p.grad) for p in wrapped.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
        state = sum(
            _size(value)
            for one in optimizer.state.values()
            for value in one.values()
            if isinstance(value, Tensor)
        )
    given_back = _given_back(recipe, model) if device.type == "cpu" else 0
    flops = counter.get_total_flops() // 2
    steps = plan.steps if plan else None
    seconds = None
    if plan:
        largest = sum(one.numel() for name, one in batch.items() if name == "input_ids")
        tokens = sum(len(rows[row]) for one in plan.batches for row in one)
        seconds = flops * tokens / max(1, largest) / speed
    return Estimate(
        weights=weights - packed - given_back,
        gradients=gradients,
        optimizer=state,
        activations=memory.peak - gradients - state,
        heap=heap_holes(memory.peak) if device.type == "cpu" else 0,
        process=process if device.type == "cpu" else 0,
        flops=flops,
        steps=steps,
        seconds=seconds,
        num_parameters=parts.num_parameters,
        notes=planned.notes,
    )


class _FourBitLinear(nn.Linear):
    """Stands for bitsandbytes' layer: unpacked while it is used, and it answers in the format that
    it is asked in, whatever autocast says."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _FourBitProduct.apply(input, self.weight)
        return (output if self.bias is None else output + self.bias).to(input.dtype)


class _FourBitProduct(torch.autograd.Function):
    """No unpacked weight is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.to(grad.dtype), None


def _mark_four_bits(language_model: nn.Module) -> None:
    for layer in language_model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = _FourBitLinear


def _saved_by_four_bits(recipe: InstructionRecipe, model: Any) -> int:
    """Bytes that the linear layers of the language model are smaller by, less one at full size:
    each is unpacked while it is used."""
    if recipe.llm_quantization == "none":
        return 0
    weights = [
        layer.weight
        for name, layer in model.model.language_model.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    ]
    saved = sum(one.numel() * (one.element_size() - _NF4_BYTES) for one in weights)
    return int(saved - max(_size(one) for one in weights))


def _given_back(recipe: InstructionRecipe, model: Any) -> int:
    """Bytes of frozen weights that a step does not read, and that their files have."""
    if recipe.llm_quantization != "none" or recipe.frozen_precision != "fp32":
        return 0
    unread: list[Tensor] = []
    if _is_mapped(recipe.init_from or recipe.llm):
        blocks = [layer.forward for layer in model.model.language_model.layers]
        unread += [w for one in blocks if isinstance(one, FrozenBlock) for w in one.replaced]
    tower = recipe.tower or recipe.init_from
    if not recipe.trainable.tower_trains and tower is not None and _is_mapped(tower):
        unread += model.model.vision_tower.parameters()
    return sum(map(_size, unread))


def _is_mapped(name: str) -> bool:
    """Of what is not here nothing is known, and more is better expected."""
    embedded = name in ("embedded", EMBEDDED_LLM)
    return holds_fp32(embedded_llm_folder() if embedded else Path(name))


def _largest_batch(
    recipe: InstructionRecipe,
    model: Any,
    rows: Sequence[Row],
    plan: RunPlan | None,
    data: InstructionData | None,
) -> dict[str, Tensor]:
    """By tokens with padding; where there are no rows, as many as the recipe allows."""
    if plan is not None and data is not None:
        known = picture_sizes(data) if is_tiled(model) else None

        def pictures(image_keys: Sequence[int]) -> dict[str, Tensor]:
            sizes = None if known is None else [known[key] for key in image_keys]
            return _seen(recipe, model, len(image_keys), sizes)

        numbers = max(
            plan.batches, key=lambda one: len(one) * max((len(rows[row]) for row in one), default=0)
        )
        return collate([rows[number] for number in numbers], pictures, 0)
    config = model.config
    context = recipe.max_length or config.text_config.max_position_embeddings
    length = min(context, max(1, recipe.max_tokens_per_batch // recipe.batch_rows))
    labels = recipe.batch_rows * max(1, length - config.image_seq_length) // 2
    places = torch.zeros(recipe.batch_rows, length, dtype=torch.int64)
    sizes = None
    if is_tiled(model):
        largest = max(config.image_grid_pinpoints, key=math.prod)
        sizes = [(int(largest[0]), int(largest[1]))] * recipe.batch_rows
    return {
        "input_ids": places,
        "position_ids": places,
        "branch_ids": places,
        "token_places": places.flatten(),
        "row_lengths": torch.full((recipe.batch_rows,), length),
        "label_positions": torch.zeros(labels, dtype=torch.int64),
        "labels": torch.zeros(labels, dtype=torch.int64),
        "read_tokens": torch.zeros(labels, dtype=torch.int64),
        **_seen(recipe, model, recipe.batch_rows, sizes),
    }


def _seen(
    recipe: InstructionRecipe, model: Any, count: int, sizes: Sequence[tuple[int, int]] | None
) -> dict[str, Tensor]:
    """What a step reads of ``count`` pictures; of those shown in tiles, their ``sizes``."""
    config = model.config
    vision = config.vision_config
    if sizes is not None:
        count = sum(num_views(model, size) for size in sizes)
    if recipe.trainable.tower_trains:
        side = vision.image_size
        height, width = (side, side) if isinstance(side, int) else side
        seen = {"pixel_values": torch.empty(count, 3, height, width)}
    else:
        seen = {"image_features": torch.empty(count, _tower_tokens(config), vision.hidden_size)}
    if sizes is not None:
        seen["image_sizes"] = torch.tensor(sizes).reshape(-1, 2)
    return seen


def _tower_tokens(config: Any) -> int:
    return int(getattr(config, "num_tower_tokens", config.image_seq_length))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops_per_second(device: torch.device, bf16: bool, seconds: float = 0.5) -> float:
    """How fast this machine multiplies matrices of a language model's size."""
    kind = torch.bfloat16 if bf16 else torch.float32
    left = torch.randn(512, 1024, device=device, dtype=kind)
    right = torch.randn(1024, 1024, device=device, dtype=kind)
    left @ right
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count * 2 * left.numel() * right.shape[1] / (time.monotonic() - started)
