"""A published CLIP-MoE checkpoint as a folder of ours (the layout of ``OpenSparseLLMs/CLIP-MoE``).

The file is a plain dictionary of tensors without a configuration: everything but ``top_k`` is read
from its names and shapes. W width, E experts, G patches along a side, P pixels of a patch.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_moe.checkpoint import empty_model, save
from vision_moe.configuration import CLIPMoEConfig
from vision_moe.errors import InputError
from vision_moe.modeling import CLIPMoEModel

#: Rows of the text positions that Long-CLIP keeps from CLIP's own table.
_KEPT_POSITIONS = 20
_HEAD_WIDTH = 64
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^experts\.(\d+)\.(c_fc|c_proj)\.(weight|bias)$")


def convert_clip_moe(
    source: str | os.PathLike[str], out: str | os.PathLike[str], top_k: int = 2
) -> CLIPMoEModel:
    """Read a published checkpoint and write it as a CLIP-MoE folder.

    Args:
        source: ``.pt`` file, read without running anything that it may hold.
        out: the folder, which appears whole or not at all.
        top_k: experts for each token; the file does not say (the paper: 2 of 4).

    Returns:
        The model, in fp32.

    Raises:
        InputError: the file is damaged, or holds something else.
    """
    source = Path(source)
    model = from_published(read_tensors(source), str(source), top_k)
    save(model, out)
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file; a stranger's bytes are never executed."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, or is damaged; it is not read"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: damaged or not a PyTorch file ({reason})") from error
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: {str(key)[:80]!r} is a {type(value).__name__}, not a tensor")
        # A tensor may claim any size by repeating the few bytes that it has.
        if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
            raise InputError(f"{path}: {key} claims more numbers than the file holds")
        if not value.is_floating_point():
            raise InputError(f"{path}: {key} is of type {value.dtype}, not a floating-point tensor")
        if not bool(value.isfinite().all()):
            raise InputError(f"{path}: {key} holds numbers that are not finite")
    return dict(content)


def from_published(tensors: Mapping[str, Tensor], source: str, top_k: int = 2) -> CLIPMoEModel:
    """Build the model that a published checkpoint describes.

    Args:
        tensors: as in the file.
        source: names it in messages.
        top_k: experts for each token.
    """
    layout = _Layout(tensors, source)
    config = layout.config(top_k)
    state = layout.state_dict()
    try:
        model = empty_model(config)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except Exception as error:  # open_clip raises whatever a wrong shape makes it stumble over
        raise InputError(f"{source}: no CLIP can be built from its shapes ({error})") from error
    expected = {key: value.shape for key, value in model.state_dict().items()}
    for key in sorted(expected.keys() - state.keys()):
        raise InputError(f"{source}: {layout.published_name(key)} is missing")
    for key in sorted(state.keys() - expected.keys()):
        name = layout.published_name(key)
        raise InputError(f"{source}: {name} does not belong to a CLIP-MoE of this layout")
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise InputError(
                f"{source}: {layout.published_name(key)} has shape {tuple(state[key].shape)}, and"
                f" the other tensors ask for {tuple(shape)}"
            )
    model.load_state_dict(state, assign=True)
    return model.eval()


class _Layout:
    """The published names and shapes, and what they say of the model."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.tensors = tensors
        self.source = source
        self.names: dict[str, str] = {}                    # ours -> published

    def published_name(self, key: str) -> str:
        """The name in the file of one of our weights."""
        if key in self.names:
            return self.names[key]
        key = key.removeprefix("text.").replace(".mlp.router.", ".gate.")
        return key.replace(".mlp.experts.", ".experts.")

    def _shape(self, key: str, num_dims: int) -> tuple[int, ...]:
        if key not in self.tensors:
            raise InputError(
                f"{self.source}: not a CLIP-MoE in the published layout, {key} is missing"
            )
        shape = tuple(self.tensors[key].shape)
        if len(shape) != num_dims or not all(shape):
            raise InputError(f"{self.source}: {key} has shape {shape}, {num_dims} dimensions fit")
        return shape

    def config(self, top_k: int) -> CLIPMoEConfig:
        width, _, patch_size, _ = self._shape("visual.conv1.weight", 4)
        num_positions, _ = self._shape("visual.positional_embedding", 2)
        grid = round((num_positions - 1) ** 0.5)
        if grid**2 + 1 != num_positions:
            raise InputError(
                f"{self.source}: visual.positional_embedding has {num_positions} rows, which is no"
                " square of patches and a class token"
            )
        _, embed_dim = self._shape("visual.proj", 2)
        vocab_size, text_width = self._shape("token_embedding.weight", 2)
        context_length, _ = self._shape("positional_embedding", 2)
        vision, text = self._tower("visual."), self._tower("")
        moe = None
        if experts := {**vision.experts, **text.experts}:
            numbers = set(experts.values())
            if len(numbers) > 1:
                raise InputError(
                    f"{self.source}: blocks with {sorted(numbers)} experts side by side"
                )
            moe = {
                "num_experts": numbers.pop(),
                "top_k": top_k,
                "vision_layers": sorted(index for _, index in vision.experts),
                "text_layers": sorted(index for _, index in text.experts),
            }
        return CLIPMoEConfig(
            open_clip_config={
                "embed_dim": embed_dim,
                "quick_gelu": True,
                "vision_cfg": {
                    "image_size": grid * patch_size,
                    "patch_size": patch_size,
                    "width": width,
                    "head_width": _HEAD_WIDTH,
                    "layers": vision.num_layers,
                    "mlp_ratio": vision.hidden / width,
                },
                "text_cfg": {
                    "context_length": context_length,
                    "vocab_size": vocab_size,
                    "width": text_width,
                    "heads": max(1, text_width // _HEAD_WIDTH),
                    "layers": text.num_layers,
                    "mlp_ratio": text.hidden / text_width,
                },
            },
            moe=moe,
        )

    def _tower(self, prefix: str) -> "_Tower":
        indices: set[int] = set()
        experts: dict[tuple[str, int], int] = {}
        hidden = 0
        for key in self.tensors:
            match = _BLOCK.match(key)
            if match is None or (match[1] or "") != prefix:
                continue
            index, rest = int(match[2]), match[3]
            indices.add(index)
            if rest == "gate.weight":
                experts[prefix, index] = self._shape(key, 2)[0]
            if rest.endswith("c_fc.weight"):
                hidden = self._shape(key, 2)[0]
        if not indices or indices != set(range(len(indices))) or not hidden:
            where = f"{prefix}transformer.resblocks"
            raise InputError(
                f"{self.source}: not a CLIP-MoE in the published layout, {where} has no unbroken"
                " row of blocks with feed-forward networks"
            )
        return _Tower(len(indices), hidden, experts)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights under our names, in fp32, the text positions fused."""
        state: dict[str, Tensor] = {}
        for key, value in self.tensors.items():
            if key == "positional_embedding_res":
                continue
            name = self._our_name(key)
            self.names[name] = key
            state[name] = value.float().contiguous()
        if "positional_embedding_res" in self.tensors:
            table = state["text.positional_embedding"].clone()
            stretched = self.tensors["positional_embedding_res"].float()
            if stretched.shape != table.shape:
                raise InputError(
                    f"{self.source}: positional_embedding_res has shape {tuple(stretched.shape)},"
                    f" positional_embedding {tuple(table.shape)}"
                )
            table[_KEPT_POSITIONS:] = stretched[_KEPT_POSITIONS:]
            state["text.positional_embedding"] = table
        return state

    @staticmethod
    def _our_name(key: str) -> str:
        if match := _BLOCK.match(key):
            rest = match[3]
            if rest == "gate.weight":
                rest = "mlp.router.weight"
            elif _EXPERT.match(rest):
                rest = f"mlp.{rest}"
            key = f"{match[1] or ''}transformer.resblocks.{match[2]}.{rest}"
        return key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}"


class _Tower:
    """``experts``: number of experts by (tower, block)."""

    def __init__(self, num_layers: int, hidden: int, experts: dict[Any, int]) -> None:
        self.num_layers, self.hidden, self.experts = num_layers, hidden, experts
