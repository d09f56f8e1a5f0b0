"""What a training step reads of its pictures; :class:`train.features.TowerFeatures` is the other.

I pictures of a batch, n of the data, H, W sides.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor


class Pictures(Protocol):
    """Numbers of I pictures in, arguments of the model out."""

    def __call__(self, image_keys: Sequence[int]) -> dict[str, Tensor]: ...


class PixelValues:
    """``pixel_values`` ``(I, 3, H, W)``, for a tower that takes part in the step.

    Args:
        open_images: n functions that open the pictures.
        image_processor: Of the tower.
    """

    def __init__(
        self, open_images: Sequence[Callable[[], Image.Image]], image_processor: Any
    ) -> None:
        self.open_images = open_images
        self.image_processor = image_processor

    def __call__(self, image_keys: Sequence[int]) -> dict[str, Tensor]:
        # A picture for the shape alone, where all rows are text.
        images = [self.open_images[key]() for key in image_keys] or [Image.new("RGB", (8, 8))]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels[: len(image_keys)]}
