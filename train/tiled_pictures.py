"""Pictures in tiles, for training: each view is a picture of its own to the tower and its cache.

I pictures of a batch.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mllm.cache import cache_dir
from mllm.tiles import num_picture_tokens, num_views, tile_views, view_processor
from train.pictures import Pictures
from train.sources.base import InstructionData
from vision_moe import atomic_write_text


class TiledPictures:
    """The views of a data set's pictures, numbered one after another.

    Args:
        model: A LLaVA-NeXT model.
        processor: Its processor.
        data: Whose pictures are shown.
    """

    def __init__(self, model: Any, processor: Any, data: InstructionData) -> None:
        self.sizes = picture_sizes(data)
        self._counts = [num_views(model, size) for size in self.sizes]
        self._starts = np.concatenate([[0], np.cumsum(self._counts)]).astype(int)
        self._tokens = [num_picture_tokens(model, processor, size) for size in self.sizes]
        self.processor = view_processor(processor.image_processor)
        # Views of one picture are asked for together.
        views = lru_cache(maxsize=1)(partial(_views, data.open_images, processor.image_processor))
        places = [(key, n) for key, count in enumerate(self._counts) for n in range(count)]
        self.open_views: list[Callable[[], Image.Image]] = [
            partial(_view, views, key, number) for key, number in places
        ]
        pinpoints = model.config.image_grid_pinpoints
        self.identities = [
            f"{data.image_identities[key]} view {number} of {pinpoints}" for key, number in places
        ]

    def num_tokens(self, key: int) -> int:
        """Placeholders of a picture."""
        return self._tokens[key]

    def shown_by(self, views: Pictures) -> Pictures:
        """What a step reads of pictures, where ``views`` gives it of views."""

        def read(image_keys: Sequence[int]) -> dict[str, Tensor]:
            numbers = [
                number
                for key in image_keys
                for number in range(self._starts[key], self._starts[key + 1])
            ]
            sizes = [self.sizes[key] for key in image_keys]
            return {**views(numbers), "image_sizes": torch.tensor(sizes).reshape(-1, 2)}

        return read


def picture_sizes(data: InstructionData) -> list[tuple[int, int]]:
    """Height and width of every picture as it is shown, kept in the cache."""
    digest = hashlib.sha256("\n".join(data.image_identities).encode()).hexdigest()
    path = cache_dir() / "sizes" / f"{digest}.json"
    try:
        return [(int(height), int(width)) for height, width in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):  # not there yet, or damaged
        pass
    bar = tqdm(data.open_images, desc="sizes of pictures", unit="img", delay=2)
    sizes = [(image.height, image.width) for image in (open_one() for open_one in bar)]
    atomic_write_text(path, json.dumps(sizes))
    return sizes


def _views(
    open_images: Sequence[Callable[[], Image.Image]], image_processor: Any, key: int
) -> list[Image.Image]:
    return tile_views(open_images[key](), image_processor)


def _view(views: Callable[[int], list[Image.Image]], key: int, number: int) -> Image.Image:
    return views(key)[number]
