"""What a CLIP-MoE tower costs beside the dense tower: time, parameters, loading.

L tokens, D width, H hidden features, E experts, K top-k.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mllm.bench.measure import interleave
from mllm.bench.report import BenchReport
from vision_moe import (
    CLIPMoEConfig,
    CLIPMoEVisionConfig,
    CLIPMoEVisionModel,
    MoEFeedForward,
    empty_model,
    load,
    moe_layers,
    pytorch_products,
)

NUM_EXPERTS, TOP_K = 4, 2


@dataclass(frozen=True)
class Case:
    """One tower at one batch size.

    ``blocks``: how many of its blocks are built; they are alike, and a deep tower on a large batch
    takes minutes.
    """

    name: str
    batch_size: int
    blocks: int
    repeats: int


#: The paper's tower and a smaller one.
CASES = (
    Case("ViT-B-16", 1, blocks=12, repeats=9),
    Case("ViT-B-16", 8, blocks=6, repeats=5),
    Case("ViT-B-16", 32, blocks=3, repeats=3),
    Case("ViT-L-14", 1, blocks=24, repeats=5),
    Case("ViT-L-14", 8, blocks=4, repeats=3),
    Case("ViT-L-14", 32, blocks=2, repeats=3),
)
#: Ranks of low-rank experts that are measured.
RANKS = {"ViT-L-14": 32}


@dataclass
class TowerOptions:
    """Options of ``mllm bench tower``."""

    towers: list[str] = field(default_factory=lambda: ["ViT-B-16", "ViT-L-14"])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])
    all_blocks: bool = False
    """Build every block, also where that takes minutes."""
    loading: str | None = "ViT-L-14"
    """The model whose loading is measured; ``null`` for none."""
    stage: bool = True
    """Measure a DMU stage beside plain fine-tuning."""


def measure_towers(report: BenchReport, options: TowerOptions) -> None:
    """Time of dense, MoE and low-rank towers without gradients, and what the arithmetic says."""
    for case in CASES:
        if case.name in options.towers and case.batch_size in options.batch_sizes:
            measure_case(report, case, options.all_blocks)


def measure_case(report: BenchReport, case: Case, all_blocks: bool = False) -> None:
    """One tower at one batch size."""
    description = _describe(case.name)
    depth = description["vision_cfg"]["layers"]
    blocks = depth if all_blocks else min(case.blocks, depth)
    description["vision_cfg"]["layers"] = blocks
    layers = list(range(blocks))
    moe = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "vision_layers": layers}
    dense = random_tower(description, None)
    experts = random_tower(description, moe)
    config = dense.config
    assert isinstance(config, CLIPMoEVisionConfig) and isinstance(config.image_size, int)
    ratio = tower_flops(config, TOP_K) / tower_flops(config, 1)
    size = config.image_size
    images = torch.randn(case.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))

    runs = {
        "dense": _run(dense, images),
        "loop over experts": _run(straightforward(experts), images),
        "MoE": _run(experts, images),
        "MoE with PyTorch's products": _run(experts, images, onednn=False),
    }
    rank = RANKS.get(case.name)
    if rank is not None:
        low_rank = random_tower(description, {**moe, "vision_ranks": [rank] * blocks})
        runs["low-rank MoE"] = _run(low_rank, images)
    title = f"{case.name}, batch {case.batch_size}"
    prefix = f"{title}: "
    report.add_repeats(interleave(runs, case.repeats, warmup=1, description=title), prefix)

    def compare(label: str, run: str, other: str, goal: float | None, scale: float = 1.0) -> None:
        bound: Any = "<=" if goal else None
        report.compare(f"{prefix}{label}", prefix + run, prefix + other, bound, goal, scale)

    compare("MoE / (dense x FLOP ratio)", "MoE", "dense", 1.05, 1 / ratio)
    compare("MoE / loop over experts", "MoE", "loop over experts", 1.0)
    compare("MoE / dense", "MoE", "dense", None)
    plain = "MoE with PyTorch's products"
    compare(f"{plain} / (dense x FLOP ratio)", plain, "dense", None, 1 / ratio)
    compare(f"{plain} / loop over experts", plain, "loop over experts", None)
    if rank is not None:
        compare(f"low-rank MoE (rank {rank}) / dense", "low-rank MoE", "dense", 1.15)
        if blocks == depth:
            count = low_rank.num_parameters() / dense.num_parameters()
            label = f"{case.name}: parameters of low-rank MoE (rank {rank}) / dense"
            report.add_ratio(label, count, "<=", 1.10)
    report.facts[f"{title}: FLOP ratio MoE / dense"] = f"{ratio:.3f}"
    report.facts[f"{title}: blocks"] = f"{blocks} of {depth}"


def _describe(name: str) -> dict[str, Any]:
    description = open_clip.get_model_config(name)
    assert description is not None
    return copy.deepcopy(description)


def random_tower(description: dict[str, Any], moe: dict[str, Any] | None) -> CLIPMoEVisionModel:
    """A tower with small random weights, drawn much faster than its own initialisation does."""
    kept = {key: description[key] for key in ("embed_dim", "vision_cfg")}
    with torch.device("meta"):
        tower = CLIPMoEVisionModel(CLIPMoEVisionConfig(open_clip_config=kept, moe=moe))
    tower.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            bound = 1.0 if ".router." in name else 0.03
            parameter.uniform_(-bound, bound, generator=generator)
    return tower.eval()


def tower_flops(config: CLIPMoEVisionConfig, top_k: int) -> float:
    """Multiplications and additions for one picture, attention and patch embedding included.

    Args:
        config: of a ViT of open_clip's.
        top_k: K; 1 for a dense tower.
    """
    width, hidden = config.hidden_size, config.intermediate_size
    size, patch = config.image_size, config.patch_size
    assert width and hidden and isinstance(size, int) and isinstance(patch, int)
    assert config.num_hidden_layers
    patches = (size // patch) ** 2
    tokens = patches + 1
    attention = 4 * width**2 + 2 * tokens * width           # projections; scores and mixing
    block = tokens * (attention + top_k * 2 * width * hidden)
    return 2.0 * (config.num_hidden_layers * block + patches * 3 * patch**2 * width)


class LoopOverExperts(nn.Module):
    """The straightforward MoE layer: for each expert, find its tokens, run it, add its share."""

    def __init__(self, layer: MoEFeedForward) -> None:
        super().__init__()
        self.router, self.experts, self.top_k = layer.router, layer.experts, layer.top_k

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., D)``"""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(tokens)
        assert isinstance(self.experts, nn.ModuleList)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            mixed.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return mixed.view_as(x)


def straightforward(tower: CLIPMoEVisionModel) -> CLIPMoEVisionModel:
    """The same tower, weights shared, with :class:`LoopOverExperts`."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in tower.parameters()}
    other = copy.deepcopy(tower, shared)
    for name, layer in moe_layers(other).items():
        other.set_submodule(name, LoopOverExperts(layer))
    return other


def _run(tower: CLIPMoEVisionModel, images: Tensor, onednn: bool = True) -> Callable[[], Any]:
    def run() -> None:
        products = nullcontext() if onednn else pytorch_products()
        with torch.inference_mode(), products:
            tower(images)

    return run


def measure_loading(report: BenchReport, name: str, repeats: int = 3) -> None:
    """Loading a CLIP-MoE folder with both towers beside reading the bytes of its weights."""
    description = _describe(name)
    config = CLIPMoEConfig(
        open_clip_config=description,
        moe={
            "num_experts": NUM_EXPERTS,
            "top_k": TOP_K,
            "vision_layers": list(range(description["vision_cfg"]["layers"])),
            "text_layers": list(range(description["text_cfg"]["layers"])),
        },
    )
    with tempfile.TemporaryDirectory(prefix="mllm-bench-") as folder:
        weights = Path(folder) / "model.safetensors"
        config.save_pretrained(folder)
        shapes = {key: value.shape for key, value in empty_model(config).state_dict().items()}
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, weights)
        runs = {"reading": weights.read_bytes, "loading": lambda: load(folder)}
        prefix = f"{name} CLIP-MoE: "
        report.add_repeats(interleave(runs, repeats, description="loading"), prefix)
        report.facts[f"{prefix}bytes of weights"] = f"{weights.stat().st_size:,}"
    report.compare(f"{prefix}loading / reading", f"{prefix}loading", f"{prefix}reading", "<=", 1.2)
