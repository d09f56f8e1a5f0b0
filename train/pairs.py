"""Image-text pairs for contrastive training: pictures as pixels, captions as tokens.

M pairs, B batch, H, W the model's input, L tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from mllm.scenes import ScenesDataset, render_pictures
from train.pair_files import PairSource, limit_of_skipped
from train.pair_sources import open_source
from train.recipe import ImageTextData
from train.scene_world import scene_world
from vision_moe import CLIPMoEModel, ClusterBatchSampler, InputError

_NUM_CAPTIONS_LOOKED_AT = 1000
_NUM_BATCHES_TO_FILL_FROM = 8
_NUM_DRAWS = 1000


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
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def tokens(self, indices: np.ndarray) -> Tensor:
        tokens: Tensor = self.tokenizer([self.source.caption(i) for i in indices.tolist()])
        return tokens

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels: list[Tensor | None] = []
        for index in indices.tolist():
            try:
                pixels.append(self.preprocess(self.source.image(index)))
            except InputError as error:
                pixels.append(None)
                self.skip({index: str(error)})
        # At least one: a hundred unreadable ones among ten thousand may meet, never a whole batch.
        shape = next((one.shape for one in pixels if one is not None), (3, 1, 1))
        whole = torch.stack([torch.zeros(shape) if one is None else one for one in pixels])
        return whole, torch.tensor([one is not None for one in pixels])

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
        return ScenePairs(dataset, scene_captions(dataset, data.caption), model)
    pairs = FilePairs(open_source(data), model)
    _tell_of_long_captions(pairs, model)
    return pairs


def _tell_of_long_captions(pairs: FilePairs, model: CLIPMoEModel) -> None:
    chosen = np.linspace(0, len(pairs) - 1, min(len(pairs), _NUM_CAPTIONS_LOOKED_AT)).astype(int)
    tokens = pairs.tokens(chosen)
    full = int(tokens[:, -1].ne(model.text.pad_id).sum())  # type: ignore[arg-type]
    if full:
        print(
            f"{full} of {len(chosen)} captions fill the text context of {tokens.shape[1]} tokens;"
            " what goes beyond it is cut off",
            file=sys.stderr,
        )


def tell_of_skipped(skipped: Mapping[int, str], num_pairs: int, listed_in: str) -> None:
    """Say how many pictures could not be read, if any."""
    if skipped:
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


def scene_captions(dataset: ScenesDataset, kind: str) -> list[str]:
    """``coarse`` or ``detailed`` captions of all scenes."""
    numbers = tqdm(range(len(dataset)), desc="writing captions", unit="caption", delay=2)
    return [getattr(dataset[i], f"{kind}_caption") for i in numbers]


def tokenize(model: CLIPMoEModel, captions: Sequence[str], chunk: int = 4096) -> Tensor:
    """``(M, L)`` tokens of all captions, with progress."""
    starts = range(0, len(captions), chunk)
    bar = tqdm(starts, desc="tokenising captions", unit="chunk", delay=2)
    return torch.cat([model.tokenizer(list(captions[start : start + chunk])) for start in bar])


class PairBatches(Dataset[dict[str, Tensor]]):
    """Every batch of a run, in shares: item ``i`` is share ``i % W`` of batch ``i // W``.

    The Trainer deals items to its W processes in turn, so that each step's shares are of one batch.
    Where a picture cannot be read, another pair, drawn at random, takes its place.

    Args:
        pairs: What the batches are made of.
        batches: Pair numbers of every batch.
        model: Whose text tower says which padding may be cut.
        num_shares: W; the batches' sizes are multiples of it.
    """

    def __init__(
        self,
        pairs: Pairs,
        batches: Sequence[np.ndarray],
        model: CLIPMoEModel,
        num_shares: int = 1,
    ) -> None:
        self.pairs = pairs
        self.batches = batches
        self.trim_tokens = model.trim_tokens
        self.num_shares = num_shares

    def __len__(self) -> int:
        return len(self.batches) * self.num_shares

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, share = divmod(index, self.num_shares)
        batch = self.batches[number].astype(np.int64)  # a copy
        size = len(batch) // self.num_shares
        mine = slice(share * size, (share + 1) * size)
        pixel_values, readable = self.pairs.read(batch[mine])
        for row in (~readable).nonzero().flatten().tolist():
            batch[mine][row], pixel_values[row] = self._substitute(batch, int(batch[mine][row]))
        # Cut as the whole batch is: the balance loss counts tokens.
        tokens = self.trim_tokens(self.pairs.tokens(batch))[mine]
        return {"pixel_values": pixel_values, "input_ids": tokens}

    def _substitute(self, batch: np.ndarray, unreadable: int) -> tuple[int, Tensor]:
        """A pair that is not in the batch, and its pixels."""
        rng = np.random.default_rng(unreadable)
        for other in rng.integers(len(self.pairs), size=_NUM_DRAWS).tolist():
            if other not in self.pairs.skipped and other not in batch:
                pixel_values, readable = self.pairs.read(np.array([other]))
                if readable[0]:
                    return other, pixel_values[0]
        raise InputError(
            f"{self.pairs.skipped[unreadable]}; no other pair was found that can take its place"
        )


class EpochBatches(Sequence[np.ndarray]):
    """The batches of ``steps`` steps, epoch after epoch; one epoch's plan is held at a time.

    Args:
        plan: An epoch's batches, by its number; as many in every epoch.
        per_epoch: How many.
        steps: Length of the run.
    """

    def __init__(
        self, plan: Callable[[int], Sequence[np.ndarray]], per_epoch: int, steps: int
    ) -> None:
        self.plan = plan
        self.per_epoch = per_epoch
        self.steps = steps
        self.held: tuple[int, Sequence[np.ndarray]] | None = None

    def __len__(self) -> int:
        return self.steps

    @overload
    def __getitem__(self, step: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, step: slice) -> list[np.ndarray]: ...

    def __getitem__(self, step: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(self.steps))]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        epoch, number = divmod(step, self.per_epoch)
        if self.held is None or self.held[0] != epoch:
            self.held = (epoch, self.plan(epoch))
        return self.held[1][number]


def random_batches(
    num_pairs: int,
    batch_size: int,
    steps: int,
    seed: int,
    left_out: np.ndarray | None = None,
) -> EpochBatches:
    """``steps`` whole batches from one shuffled epoch after another.

    Args:
        num_pairs: M.
        batch_size: Pairs in a batch, if there are as many.
        steps: How many batches.
        seed: Of the shuffles.
        left_out: Numbers of pairs that take no part; none by default.
    """
    usable = np.arange(num_pairs, dtype=np.int32 if num_pairs < 2**31 else np.int64)
    if left_out is not None:
        usable = np.setdiff1d(usable, left_out)
    size = min(batch_size, len(usable))
    per_epoch = len(usable) // size

    def plan(epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([seed, epoch]).permutation(usable)
        return np.split(order[: per_epoch * size], per_epoch)

    return EpochBatches(plan, per_epoch, steps)


def cluster_batches(sampler: ClusterBatchSampler, steps: int) -> EpochBatches:
    """``steps`` batches from one epoch of the sampler after another.

    Each epoch's last batch, where it is cut short, is filled up with other pairs of the epoch: no
    pair is left out, and every step weighs the same.
    """

    def plan(epoch: int) -> list[np.ndarray]:
        sampler.set_epoch(epoch)
        *whole, last = sampler.batches()
        missing = sampler.batch_size - len(last)
        if missing and whole:
            rng = np.random.default_rng([sampler.seed, epoch, 1])
            others = np.concatenate(whole[-_NUM_BATCHES_TO_FILL_FROM:])
            last = np.concatenate([last, rng.choice(others, missing, replace=False)])
        return [*whole, last]

    return EpochBatches(plan, len(sampler), steps)
