"""Image-text pairs for contrastive training: pictures as pixels, captions as tokens.

M pairs, B batch, H, W the model's input, L tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mllm.scenes import ScenesDataset, render_pictures
from train.pair_files import PairSource, limit_of_skipped
from train.pair_sources import open_source
from train.processes import processes
from train.recipe import ImageTextData
from train.scene_world import scene_world
from vision_moe import CLIPMoEModel, InputError

_NUM_CAPTIONS_LOOKED_AT = 1000
_NUM_READERS = 4


class Pairs(Protocol):
    """M pairs by number, ready for the towers of one model."""

    skipped: dict[int, str]
    """Pairs whose picture could not be read, so far, and why."""

    def __len__(self) -> int: ...

    def tokens(self, indices: np.ndarray) -> Tensor:
        """``(B, L)`` int64, padded to the context length."""
        ...

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels ``(B, 3, H, W)`` float32, and ``(B,)`` bool: which pictures could be read; the
        others are zeros.

        Raises:
            InputError: More than one picture in a hundred cannot be read.
        """
        ...

    def skip(self, reasons: Mapping[int, str]) -> None:
        """Take note of pairs that are known to be unreadable."""
        ...


class ScenePairs:
    """Scenes rendered at the model's input size, all of them, as bytes.

    Args:
        dataset: Whose pictures are rendered, once for each machine and configuration.
        captions: Of each scene.
        model: Whose preprocessing and tokenizer are used.
    """

    def __init__(self, dataset: ScenesDataset, captions: Sequence[str], model: CLIPMoEModel):
        self.pictures = render_pictures(dataset)  # (M, H, W, 3) uint8, memory-mapped
        self.all_tokens = tokenize(model, captions)
        self.skipped: dict[int, str] = {}
        preprocess = model.config.preprocess
        assert preprocess is not None
        self.mean = torch.tensor(preprocess["mean"])
        self.std = torch.tensor(preprocess["std"])

    def __len__(self) -> int:
        return len(self.all_tokens)

    def tokens(self, indices: np.ndarray) -> Tensor:
        return self.all_tokens[indices]

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(self.pictures[indices]).float() / 255  # (B, H, W, 3)
        normalized = ((pixels - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()
        return normalized, torch.ones(len(indices), dtype=torch.bool)

    def skip(self, reasons: Mapping[int, str]) -> None:
        assert not reasons, "a rendered picture can be read"


class FilePairs:
    """Pictures and captions on the disk, read when their turn comes.

    Args:
        source: Of the pairs.
        model: Whose preprocessing and tokenizer are used.
    """

    def __init__(self, source: PairSource, model: CLIPMoEModel):
        self.source = source
        self.tokenizer = model.tokenizer
        self.preprocess = model.preprocess
        self.shape = self.preprocess(Image.new("RGB", (1, 1))).shape
        self.readers = ThreadPoolExecutor(_NUM_READERS)  # most of their time is decoding, unlocked
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def tokens(self, indices: np.ndarray) -> Tensor:
        tokens: Tensor = self.tokenizer([self.source.caption(i) for i in indices.tolist()])
        return tokens

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels: list[Tensor | None] = []
        numbers = indices.tolist()
        for index, found in zip(numbers, self.readers.map(self._read, numbers), strict=True):
            pixels.append(None if isinstance(found, str) else found)
            if isinstance(found, str):
                self.skip({index: found})
        blank = torch.zeros(self.shape)
        whole = torch.stack([blank if one is None else one for one in pixels])
        return whole, torch.tensor([one is not None for one in pixels])

    def _read(self, index: int) -> Tensor | str:
        """The pixels, or why there are none."""
        try:
            return self.preprocess(self.source.image(index))
        except InputError as error:
            return str(error)

    def skip(self, reasons: Mapping[int, str]) -> None:
        for index, reason in reasons.items():
            if index not in self.skipped:
                self.skipped[index] = reason
                if len(self.skipped) > limit_of_skipped(len(self)):
                    raise InputError(
                        f"{len(self.skipped)} of {len(self)} pictures cannot be read, more than"
                        f" one in a hundred; {self.source.name(index)}: {reason}"
                    )


def load_pairs(data: ImageTextData, model: CLIPMoEModel, seed: int) -> Pairs:
    """The pairs that a recipe describes.

    Raises:
        InputError: A file or picture is missing, or a record is damaged.
    """
    if data.num_pairs == 1:
        raise InputError("'data.num_pairs' is 1, but a contrastive batch needs at least 2 pairs")
    if data.name == "scenes":
        dataset = scenes_dataset(data, model, seed)
        coarse_share = 1.0 if data.caption == "coarse" else data.coarse_share
        return ScenePairs(dataset, scene_captions(dataset, coarse_share, seed), model)
    pairs = FilePairs(open_source(data), model)
    _tell_of_long_captions(pairs, model)
    return pairs


def _tell_of_long_captions(pairs: FilePairs, model: CLIPMoEModel) -> None:
    chosen = np.linspace(0, len(pairs) - 1, min(len(pairs), _NUM_CAPTIONS_LOOKED_AT)).astype(int)
    tokens = pairs.tokens(chosen)
    full = int(tokens[:, -1].ne(model.text.pad_id).sum())  # type: ignore[arg-type]
    if full and processes().is_main_process:
        print(
            f"{full} of {len(chosen)} captions fill the text context of {tokens.shape[1]} tokens;"
            " what goes beyond it is cut off",
            file=sys.stderr,
        )


def tell_of_skipped(skipped: Mapping[int, str], num_pairs: int, listed_in: str) -> None:
    """Say how many pictures could not be read, if any."""
    if skipped and processes().is_main_process:
        first = next(iter(skipped.values()))
        print(
            f"{len(skipped)} of {num_pairs} pictures could not be read and were skipped"
            f" (listed in {listed_in}), such as {first}",
            file=sys.stderr,
        )


def scenes_dataset(data: ImageTextData, model: CLIPMoEModel, seed: int) -> ScenesDataset:
    """Scenes at the model's input size."""
    assert model.config.open_clip_config is not None
    size = model.config.open_clip_config["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        height, width = size
        if height != width:
            raise InputError(f"scenes are square, but the model takes pictures of {width}x{height}")
        size = height
    world = scene_world(data.world, "data.world")
    try:
        return ScenesDataset(
            world, data.split, data.num_pairs or 4000, seed, size, data.detail_probability
        )
    except ValueError as error:
        raise InputError(f"'data.world': {error}") from error


def scene_captions(dataset: ScenesDataset, coarse_share: float, seed: int) -> list[str]:
    """Of a share of the scenes, drawn with the seed, the coarse caption, else the detailed one."""
    coarse = np.random.default_rng([seed, 3]).random(len(dataset)) < coarse_share
    numbers = tqdm(range(len(dataset)), desc="writing captions", unit="caption", delay=2)
    return [
        dataset[i].coarse_caption if coarse[i] else dataset[i].detailed_caption for i in numbers
    ]


def tokenize(model: CLIPMoEModel, captions: Sequence[str], chunk: int = 4096) -> Tensor:
    """``(M, L)`` tokens of all captions, with progress."""
    starts = range(0, len(captions), chunk)
    bar = tqdm(starts, desc="tokenising captions", unit="chunk", delay=2)
    return torch.cat([model.tokenizer(list(captions[start : start + chunk])) for start in bar])
