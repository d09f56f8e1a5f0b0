"""Images as they come -> RGB -> what a tower takes."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from torch import Tensor

from vision_moe.errors import InputError

# Resizing the short side of a strip keeps its shape: 64 x 12,800 pixels is the most that a side of
# 64 can become.
MAX_ASPECT_RATIO = 200

# transformers stores PIL's numbers.
_RESAMPLE = {name: int(Image.Resampling[name.upper()]) for name in ("bilinear", "bicubic")}


def open_image(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Read any image file as RGB, upright, transparency over white.

    Args:
        source: a path or an open binary file.

    Raises:
        InputError: missing, not an image, damaged, too large or too elongated.
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # damaged metadata, which nobody needs
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                width, height = image.size
                if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                    raise InputError(f"{name}: an image of {width}x{height} is too elongated")
                image.load()
                return to_rgb(image)
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError) as error:
        raise InputError(f"{name}: the image is too large to be opened") from error
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that can be read") from error
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file makes them stumble over.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{name}: the image cannot be read ({reason})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB: upright by its EXIF tag, transparency over white, 16 bits to 8."""
    with suppress(Exception):                               # a damaged tag: taken as upright
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode != "F" and (image.mode != "I" or values.max(initial=0) > 255):
        values = values / 257                               # 65535 -> 255
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def build_preprocess(
    image_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> Callable[[Image.Image], Tensor]:
    """open_clip's evaluation transform: PIL image -> ``(3, H, W)`` float32.

    Args:
        image_size: side, or height and width.
        mean: of R, G, B.
        std: of R, G, B.
        interpolation: ``bicubic`` or ``bilinear``.
        resize_mode: ``shortest`` (short side to size, centre crop) or ``squash``.
    """
    if resize_mode not in ("shortest", "squash"):
        raise InputError(f"resize_mode is {resize_mode!r}, it must be 'shortest' or 'squash'")
    if interpolation not in _RESAMPLE:
        raise InputError(f"interpolation is {interpolation!r}, it must be 'bicubic' or 'bilinear'")
    config = PreprocessCfg(
        size=image_size if isinstance(image_size, int) else tuple(image_size),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=interpolation,
        resize_mode=resize_mode,
    )
    return image_transform_v2(config, is_train=False)


def image_processor_config(
    image_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> dict[str, Any]:
    """The same transform as a ``preprocessor_config.json`` of transformers' CLIPImageProcessor."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    crop = {"height": height, "width": width}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)} if resize_mode == "shortest" else crop,
        "resample": _RESAMPLE[interpolation],
        "do_center_crop": resize_mode == "shortest",
        "crop_size": crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
