"""Features of many pictures and texts, each computed once, in batches.

P dimensions of the common space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vision_moe.errors import InputError
from vision_moe.modeling import CLIPMoEModel

_NUM_READERS = 4


@dataclass(frozen=True)
class ImageFeatures:
    """``features`` ``(N, P)``, fp32 on the CPU, not normalised, of the pictures ``numbers``
    ``(N,)``; ``skipped`` says why each of the others could not be read."""

    features: Tensor
    numbers: Tensor
    skipped: dict[int, str] = field(default_factory=dict)


@torch.inference_mode()
def encode_images(
    model: CLIPMoEModel,
    pictures: Sequence[Callable[[], Image.Image]],
    batch_size: int = 64,
    progress: bool = True,
) -> ImageFeatures:
    """Encode pictures; those that cannot be read are left out and listed.

    Args:
        model: Used in its present mode and precision.
        pictures: Each opens one, RGB, or raises :class:`InputError`.
        batch_size: Pictures at a time.
        progress: A bar on stderr.

    Raises:
        InputError: More than one picture in a hundred cannot be read.
    """
    if not pictures:
        raise InputError("there are no pictures to encode")
    features, numbers = [], []
    skipped: dict[int, str] = {}

    def read(number: int) -> Tensor | str:
        try:
            return model.preprocess(pictures[number]())
        except InputError as error:
            return str(error)

    # The next batch is read while this one is computed.
    with (
        ThreadPoolExecutor(_NUM_READERS) as pool,
        tqdm(total=len(pictures), desc="encoding pictures", unit="picture", disable=not progress,
             delay=1) as bar,
    ):  # fmt: skip
        starts = range(0, len(pictures), batch_size)
        batches = [range(start, min(start + batch_size, len(pictures))) for start in starts]
        ahead = [pool.submit(read, number) for number in batches[0]]
        for batch, following in zip(batches, [*batches[1:], range(0)], strict=True):
            current, ahead = ahead, [pool.submit(read, number) for number in following]
            kept = []
            for number, future in zip(batch, current, strict=True):
                result = future.result()
                if isinstance(result, str):
                    skipped[number] = result
                else:
                    kept.append(result)
                    numbers.append(number)
            if len(skipped) > len(pictures) // 100:
                for future in ahead:
                    future.cancel()
                raise InputError(
                    f"{len(skipped)} of {len(pictures)} pictures cannot be read, more than one in a"
                    f" hundred: {next(iter(skipped.values()))}"
                )
            if kept:
                pixel_values = torch.stack(kept).to(model.device)
                features.append(model.encode_image(pixel_values).float().cpu())
            bar.update(len(batch))
    return ImageFeatures(torch.cat(features), torch.tensor(numbers), skipped)


@torch.inference_mode()
def encode_texts(
    model: CLIPMoEModel, texts: Sequence[str], batch_size: int = 256, progress: bool = True
) -> Tensor:
    """Encode texts, those of like length together: ``(N, P)`` fp32 on the CPU, not normalised."""
    tokens = model.tokenizer(list(texts))
    pad_id = getattr(model.text, "pad_id", 0)
    by_length = tokens.ne(pad_id).sum(1).argsort(stable=True)
    features = []
    bar = tqdm(total=len(texts), desc="encoding texts", unit="text", disable=not progress, delay=1)
    with bar:
        for chosen in by_length.split(batch_size):
            some = model.trim_tokens(tokens[chosen]).to(model.device)
            features.append(model.encode_text(some).float().cpu())
            bar.update(len(chosen))
    return torch.cat(features)[by_length.argsort()]
