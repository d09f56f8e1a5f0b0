"""Features of all pairs: in memory for an evaluation, on disk for the clustering of a stage.

M pairs, B batch, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from train.attention import attention_kernel
from train.contrastive import longest_sequence
from train.pairs import Pairs
from train.precision import use_bf16
from train.processes import processes
from train.recipe import Precision
from vision_moe import CLIPMoEModel, FeatureShards

BATCH_SIZE = 512
_Item = TypeVar("_Item")
_Read = TypeVar("_Read")


def encode_all(model: CLIPMoEModel, pairs: Pairs, precision: Precision) -> tuple[Tensor, Tensor]:
    """Image and text features of all pairs, ``(M, D)`` each, fp32 on the CPU; zeros for a pair
    whose picture cannot be read."""
    with _bar(len(pairs)) as bar:
        return encode(model, pairs, np.arange(len(pairs)), precision, bar)


def encode_to_shards(
    model: CLIPMoEModel,
    pairs: Pairs,
    precision: Precision,
    folder: Path,
    sample: np.ndarray | None = None,
) -> FeatureShards:
    """Features of all pairs, or of the ascending numbers of a ``sample``, each process encoding its
    share of the shards that are missing; of shards that have been put together by and by, the rows
    that have not come."""
    state = processes()
    shards = FeatureShards(folder, len(pairs) if sample is None else len(sample), sample)
    missing = [shard for shard in range(shards.num_shards) if not shards.is_whole(shard)]
    state.wait_for_everyone()  # all look before one writes
    mine = missing[state.process_index :: state.num_processes]
    with _bar(sum(len(shards.numbers(shard)) for shard in mine)) as bar:
        for shard in mine:
            numbers = shards.numbers(shard)
            image, text = _features_of(model, pairs, shards, shard, precision, bar)
            skipped = {i: pairs.skipped[i] for i in numbers.tolist() if i in pairs.skipped}
            shards.write(shard, image, text, skipped)
    state.wait_for_everyone()
    pairs.skip(shards.skipped())  # also what other processes found
    return shards


def _features_of(
    model: CLIPMoEModel,
    pairs: Pairs,
    shards: FeatureShards,
    shard: int,
    precision: Precision,
    bar: tqdm,
) -> tuple[np.ndarray, np.ndarray]:
    """What is kept of a shard, and the rest encoded."""
    numbers, kept = shards.numbers(shard), shards.kept(shard)
    if kept is None:
        image, text = encode(model, pairs, numbers, precision, bar)
        return image.numpy(), text.numpy()
    missing = ~(kept[0].any(axis=1) & kept[1].any(axis=1))
    bar.update(int((~missing).sum()))
    if missing.any():
        encoded = encode(model, pairs, numbers[missing], precision, bar)
        for features, new in zip(kept, encoded, strict=True):
            features[missing] = new.numpy()
    return kept


@torch.inference_mode()
def encode(
    model: CLIPMoEModel, pairs: Pairs, numbers: np.ndarray, precision: Precision, bar: tqdm
) -> tuple[Tensor, Tensor]:
    """Image and text features of some pairs, ``(n, D)`` each."""
    device = model.device
    tokens = pairs.tokens(numbers)
    by_length = tokens.ne(0).sum(1).argsort(stable=True)
    image, text = [], []
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision)),
        attention_kernel(device, longest_sequence(model)),
    ):
        batches = by_length.split(BATCH_SIZE)
        reads = one_ahead(lambda chosen: pairs.read(numbers[chosen.numpy()]), batches)
        for chosen, (pixel_values, readable) in zip(batches, reads, strict=True):
            some = model.trim_tokens(tokens[chosen])
            kept = readable[:, None]
            image.append(model.encode_image(pixel_values.to(device)).float().cpu() * kept)
            text.append(model.encode_text(some.to(device)).float().cpu() * kept)
            bar.update(len(chosen))
    back = by_length.argsort()
    return torch.cat(image)[back], torch.cat(text)[back]


def one_ahead(read: Callable[[_Item], _Read], items: Iterable[_Item]) -> Iterator[_Read]:
    """``map(read, items)``, the next one being read while the last is used."""
    with ThreadPoolExecutor(1) as reader:
        pending: Future[_Read] | None = None
        for item in items:
            following = reader.submit(read, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _bar(total: int) -> tqdm:
    main = processes().is_main_process
    return tqdm(total=total, desc="encoding pairs", unit="pair", delay=2, disable=not main)
