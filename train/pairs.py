"""Image-text pairs for contrastive training: pictures as pixels, captions as tokens.

M pairs, B batch, H, W the model's input, L tokens.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from mllm.scenes import ScenesDataset, render_pictures
from train.recipe import ImageTextData
from train.scene_world import scene_world
from vision_moe import CLIPMoEModel, InputError, open_image


class Pairs(Protocol):
    """Pairs by number, ready for the towers of one model."""

    tokens: Tensor
    """``(M, L)`` int64, padded to the context length."""

    def pixel_values(self, indices: np.ndarray) -> Tensor:
        """``(B, 3, H, W)`` float32."""
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
        self.tokens = tokenize(model, captions)
        preprocess = model.config.preprocess
        assert preprocess is not None
        self.mean = torch.tensor(preprocess["mean"])
        self.std = torch.tensor(preprocess["std"])

    def pixel_values(self, indices: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(self.pictures[indices]).float() / 255  # (B, H, W, 3)
        return ((pixels - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()


class FilePairs:
    """Pictures in files, opened when their turn comes.

    Args:
        paths: Of the pictures.
        captions: Of each picture.
        model: Whose preprocessing and tokenizer are used.
    """

    def __init__(self, paths: Sequence[Path], captions: Sequence[str], model: CLIPMoEModel):
        self.paths = paths
        self.tokens = tokenize(model, captions)
        self.preprocess = model.preprocess

    def pixel_values(self, indices: np.ndarray) -> Tensor:
        return torch.stack([self.preprocess(open_image(self.paths[i])) for i in indices])


def load_pairs(data: ImageTextData, model: CLIPMoEModel, seed: int) -> Pairs:
    """The pairs that a recipe describes.

    Raises:
        InputError: A file or picture is missing, or a record is damaged.
    """
    if data.num_pairs == 1:
        raise InputError("'data.num_pairs' is 1, but a contrastive batch needs at least 2 pairs")
    if data.name == "scenes":
        dataset = scenes_dataset(data, model, seed)
        return ScenePairs(dataset, scene_captions(dataset, data.caption), model)
    if data.path is None:
        raise InputError(f"'data.path' must name the {data.name} file")
    path = Path(data.path)
    root = Path(data.image_folder) if data.image_folder else path.parent
    records = list(islice(_read_records(path, data.name, root), data.num_pairs))
    if len(records) < 2:
        raise InputError(f"{path}: holds {len(records)} pairs, at least 2 are needed")
    return FilePairs([picture for picture, _ in records], [text for _, text in records], model)


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


def scene_captions(dataset: ScenesDataset, kind: str) -> list[str]:
    """``coarse`` or ``detailed`` captions of all scenes."""
    numbers = tqdm(range(len(dataset)), desc="writing captions", unit="caption", delay=2)
    return [getattr(dataset[i], f"{kind}_caption") for i in numbers]


def tokenize(model: CLIPMoEModel, captions: Sequence[str], chunk: int = 4096) -> Tensor:
    """``(M, L)`` tokens of all captions, with progress."""
    starts = range(0, len(captions), chunk)
    bar = tqdm(starts, desc="tokenising captions", unit="chunk", delay=2)
    return torch.cat([model.tokenizer(list(captions[start : start + chunk])) for start in bar])


def _read_records(path: Path, form: str, root: Path) -> Iterator[tuple[Path, str]]:
    """Pictures below ``root`` and captions, from the fields ``image`` and ``caption``."""
    number = 0
    try:
        # utf-8-sig: spreadsheets begin their CSV with a byte-order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: Iterable[Any] = csv.DictReader(file) if form == "csv" else _json_lines(file)
            for number, row in enumerate(rows, start=1):
                where = f"{path}, record {number}"
                record = row if isinstance(row, dict) else _parse(row, where)
                yield _picture(record, root, where), _text(record, "caption", where)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from error
    except csv.Error as error:
        raise InputError(f"{path}, record {number + 1}: not CSV ({error})") from error


def _json_lines(file: Iterable[str]) -> Iterator[str]:
    return (line for line in file if line.strip())


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object")
    return record


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: '{key}' is missing or empty")
    return value


def _picture(record: dict[str, Any], root: Path, where: str) -> Path:
    name = Path(_text(record, "image", where))
    if name.is_absolute() or ".." in name.parts:
        raise InputError(f"{where}: the picture lies outside the image folder")
    try:
        found = (root / name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise InputError(f"{where}: there is no picture {root / name}")
    return root / name


class PairBatches(Dataset[dict[str, Tensor]]):
    """Item ``i`` is the ``i``-th batch of a run.

    Args:
        pairs: What the batches are made of.
        batches: Pair numbers of every batch.
        model: Whose text tower says which padding may be cut.
    """

    def __init__(self, pairs: Pairs, batches: Sequence[np.ndarray], model: CLIPMoEModel) -> None:
        self.pairs = pairs
        self.batches = batches
        self.trim_tokens = model.trim_tokens

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chosen = self.batches[index]
        return {
            "pixel_values": self.pairs.pixel_values(chosen),
            "input_ids": self.trim_tokens(self.pairs.tokens[torch.from_numpy(chosen)]),
        }


def random_batches(num_pairs: int, batch_size: int, steps: int, seed: int) -> list[np.ndarray]:
    """``steps`` whole batches from one shuffled epoch after another."""
    size = min(batch_size, num_pairs)
    per_epoch = num_pairs // size
    batches: list[np.ndarray] = []
    for epoch in range(-(-steps // per_epoch)):
        order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
        batches += np.split(order[: per_epoch * size], per_epoch)
    return batches[:steps]
