"""Pictures that strangers upload: checked before they are decoded, refused in one sentence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vision_moe import InputError, open_image

# Formats that Pillow decodes itself; others start programs or have no pixels.
Image.init()
FORMATS: list[str] = [
    name
    for name in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    if name in Image.OPEN
]
EXTENSIONS = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"]


@dataclass(frozen=True)
class Picture:
    """An RGB picture, and what its owner should know about how it was read."""

    image: Image.Image
    notes: list[str] = field(default_factory=list)


def open_upload(path: str | Path, max_pixels: int) -> Picture:
    """Read an uploaded file; messages name it as its owner does, never where the server keeps it.

    Raises:
        InputError: Not a picture, damaged, or larger than ``max_pixels``.
    """
    name = Path(path).name
    notes = []
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # large pictures are refused below
                with Image.open(file, formats=FORMATS) as image:
                    width, height = image.size
                    num_frames = getattr(image, "n_frames", 1)
                    mode, kind = image.mode, image.format
        except Image.DecompressionBombError as error:
            raise InputError(_too_large(name, max_pixels)) from error
        except Exception as error:  # whatever a damaged header makes Pillow stumble over
            raise InputError(
                f"'{name}' is not a picture that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF or"
                " AVIF), or it is damaged"
            ) from error
        if width * height > max_pixels:
            raise InputError(_too_large(name, max_pixels, (width, height)))
        if num_frames > 1 and kind != "MPO":
            notes.append(f"'{name}' has {num_frames} frames; the first is shown to the model")
        if mode == "CMYK":
            notes.append(f"'{name}' has printing colors (CMYK); they were converted to RGB")
        file.seek(0)
        try:
            return Picture(open_image(file), notes)
        except InputError as error:
            raise InputError(str(error).replace("the image:", f"'{name}':", 1)) from error


def _too_large(name: str, max_pixels: int, size: tuple[int, int] | None = None) -> str:
    has = f"has {size[0]:,} x {size[1]:,} pixels" if size else "has too many pixels"
    return f"'{name}' {has}; this demo takes pictures of up to {max_pixels / 1e6:,.0f} million"
