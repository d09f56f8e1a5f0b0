"""What a checkpoint consists of, and how its routers share the work among the experts.

E experts, K top-k.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import vision_moe
from mllm.diagnosis.plots import save_figure
from mllm.model import load_mllm
from mllm.scenes import ScenesDataset, SceneWorld
from vision_moe import (
    CLIPMoEModel,
    MoEFeedForward,
    open_image,
    record_routing,
)

_NUM_SCENES = 16


@dataclass(frozen=True)
class PartSize:
    """Parameters of a part of the model; ``active`` are those that one token passes through."""

    name: str
    total: int
    active: int


@dataclass(frozen=True)
class BlockRouting:
    """``load`` is the share of a block's choices that fell on each expert ``(E,)``."""

    name: str
    num_experts: int
    top_k: int
    load: tuple[float, ...]


@dataclass(frozen=True)
class Inspection:
    """The measured facts about a checkpoint."""

    name: str
    parts: list[PartSize]
    blocks: list[BlockRouting]

    def table(self) -> str:
        """Parameters by part, then the load of each block, as text."""
        width = max(len(part.name) for part in self.parts)
        lines = [f"{'part':<{width}}  {'parameters':>13}  {'active for one token':>20}"]
        lines += [f"{p.name:<{width}}  {p.total:>13,}  {p.active:>20,}" for p in self.parts]
        if not self.blocks:
            return "\n".join([*lines, "", "no experts: a dense model"])
        width = max(len(block.name) for block in self.blocks)
        num_experts, top_k = self.blocks[0].num_experts, self.blocks[0].top_k
        experts = "  ".join(f"{f'expert {e}':>8}" for e in range(num_experts))
        lines += [
            "",
            f"routing load: each token goes to {top_k} of {num_experts} experts;"
            f" the share of these choices that each got (even: {1 / num_experts:.1%})",
            f"{'':<{width}}  {experts}",
        ]
        for block in self.blocks:
            shares = "  ".join(f"{share:>8.1%}" for share in block.load)
            lines.append(f"{block.name:<{width}}  {shares}")
        return "\n".join(lines)


def inspect_checkpoint(
    checkpoint: str | Path, image_files: Sequence[str | Path] = (), seed: int = 0
) -> Inspection:
    """Measure a CLIP or MLLM folder on pictures, by default on a handful of rendered scenes.

    Args:
        checkpoint: A CLIP folder (dense or MoE) or an MLLM folder.
        image_files: Pictures to route; the text tower is then left out.
        seed: Of the scenes.
    """
    if image_files:
        images, captions = [open_image(file) for file in image_files], []
    else:
        scenes = ScenesDataset(SceneWorld(), "test", _NUM_SCENES, seed)
        samples = [scenes[index] for index in range(len(scenes))]
        images = [sample.image for sample in samples]
        captions = [sample.detailed_caption for sample in samples]
    if _model_type(Path(checkpoint)) == "clip_moe":
        clip = vision_moe.load(checkpoint)
        return Inspection(str(checkpoint), _sizes(_clip_parts(clip)), _clip_routing(
            clip, images, captions
        ))  # fmt: skip
    model, processor = load_mllm(checkpoint)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return Inspection(
        str(checkpoint), _sizes(_mllm_parts(model)), _mllm_routing(model, pixels.to(model.dtype))
    )


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None  # load_mllm says what is wrong


def _clip_parts(clip: CLIPMoEModel) -> dict[str, nn.Module]:
    return {"vision tower": clip.visual, "text tower": clip.text, "all": clip}


def _mllm_parts(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    return {
        "vision tower": model.model.vision_tower,
        "connector": model.model.multi_modal_projector,
        "language model": model.model.language_model,
        "all": model,
    }


def _sizes(parts: dict[str, nn.Module]) -> list[PartSize]:
    return [PartSize(name, *count_parameters(module)) for name, module in parts.items()]


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Parameters in all, and those that one token passes through: K of E experts a block."""
    total = sum(parameter.numel() for parameter in module.parameters())
    layers = [layer for layer in module.modules() if isinstance(layer, MoEFeedForward)]
    return total, total - sum(layer.num_idle_parameters() for layer in layers)


@torch.inference_mode()
def _clip_routing(
    clip: CLIPMoEModel, images: Sequence[Image.Image], captions: Sequence[str]
) -> list[BlockRouting]:
    with record_routing(clip.visual) as vision:
        clip.encode_image(torch.stack([clip.preprocess(image) for image in images]))
    blocks = _blocks("vision", vision.expert_load(), vision.top_k)
    if captions:
        tokens = clip.trim_tokens(clip.tokenizer(list(captions)))
        with record_routing(clip.text) as text:
            clip.encode_text(tokens)
        blocks += _blocks("text", text.expert_load(), text.top_k)
    return blocks


@torch.inference_mode()
def _mllm_routing(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> list[BlockRouting]:
    tower = model.model.vision_tower
    with record_routing(tower) as record:
        tower(pixel_values)
    return _blocks("vision", record.expert_load(), record.top_k)


def _blocks(tower: str, loads: dict[str, Tensor], top_k: dict[str, int]) -> list[BlockRouting]:
    return [
        BlockRouting(f"{tower} MoE block {number}", len(load), top_k[name], tuple(load.tolist()))
        for number, (name, load) in enumerate(loads.items())
    ]


def draw(inspection: Inspection, file: str | Path) -> None:
    """Write a picture (PNG) of the parameters by part and the load by block and expert."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = inspection.blocks
    figure = Figure(figsize=(11 if blocks else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    sizes, *heatmap = figure.subplots(1, 2 if blocks else 1, squeeze=False)[0]
    names = [part.name for part in inspection.parts]
    sizes.barh(names, [part.total / 1e6 for part in inspection.parts], color="#c6d4e8", label="all")
    sizes.barh(
        names,
        [part.active / 1e6 for part in inspection.parts],
        height=0.5,
        color="#2b5c9e",
        label="active for a token",
    )
    sizes.invert_yaxis()
    sizes.set_xlabel("parameters, millions")
    sizes.legend()
    for axes in heatmap:
        loads = [block.load for block in blocks]
        heat = axes.imshow(loads, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set_xticks(range(blocks[0].num_experts))
        axes.set_yticks(range(len(blocks)), [block.name for block in blocks])
        axes.set_xlabel("expert")
        axes.set_title(f"share of the choices (top-{blocks[0].top_k})")
        for row, load in enumerate(loads):
            for expert, share in enumerate(load):
                color = "white" if share > 0.5 else "black"
                axes.text(expert, row, f"{share:.0%}", ha="center", va="center", color=color)
        figure.colorbar(heat, ax=axes)
    figure.suptitle(Path(inspection.name).name)
    save_figure(figure, file)
