"""Draw a scene with anti-aliasing: four times as large as asked for, then averaged down."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mllm.scenes.world import PLACES, Scene, SceneObject, _cell_center

_SUPERSAMPLING = 4
_RGB = {
    "red": (230, 20, 20), "green": (15, 225, 25), "blue": (20, 25, 235),
    "yellow": (245, 235, 15), "black": (10, 10, 10), "gray": (128, 128, 128),
    "teal": (0, 128, 128), "brown": (160, 45, 40), "orange": (250, 140, 10),
    "purple": (135, 30, 190), "pink": (250, 130, 190),
}  # fmt: skip
_COLOR_JITTER = 12


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Render ``scene`` to an RGB picture of ``image_size`` x ``image_size`` pixels."""
    side = image_size * _SUPERSAMPLING
    # A generator for each part: what one part draws from its own does not change the others.
    canvas = _background(scene.background, side, np.random.default_rng([scene.nuisance, 0]))
    for number, obj in enumerate(scene.objects, start=1):
        _draw_object(canvas, obj, side, np.random.default_rng([scene.nuisance, number]))
    if scene.letter is not None:
        assert scene.letter_place in PLACES
        x, y = _cell_center(scene.letter_place)
        ink = (245, 245, 245) if scene.background == "night" else (25, 25, 40)
        ImageDraw.Draw(canvas).text(
            (x * side, y * side),
            scene.letter,
            fill=ink,
            font=_font(round(side * 0.27)),
            anchor="mm",
        )
    return canvas.reduce(_SUPERSAMPLING)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _background(name: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A flat tint or a gradient with the marks that make it grass, sand, sky, paper or night."""
    if name == "plain":
        return Image.new("RGB", (side, side), _tint(rng, (242, 242, 242), 13))
    top, bottom, spread = {
        "grass": ((205, 232, 250), (176, 222, 160), 8),
        "sand": ((250, 238, 205), (238, 214, 165), 8),
        "night": ((14, 16, 44), (44, 44, 92), 6),
        "paper": ((252, 251, 246), (248, 247, 240), 4),
        "sky": ((165, 205, 245), (222, 238, 252), 8),
    }[name]
    canvas = _gradient(_tint(rng, top, spread), _tint(rng, bottom, spread), side)
    draw = ImageDraw.Draw(canvas)
    if name == "grass":
        for x, y in rng.uniform(0, side, (40, 2)) * (1, 0.5) + (0, side * 0.5):
            draw.line((x, y, x + side * 0.01, y - side * 0.05), (120, 185, 105), side // 90)
    elif name == "sand":
        for x, y in rng.uniform(0, side, (60, 2)):
            _dot(draw, x, y, side * 0.008, (205, 178, 128))
    elif name == "night":
        for x, y in rng.uniform(0, side, (25, 2)):
            _dot(draw, x, y, side * rng.uniform(0.004, 0.011), (235, 235, 200))
    elif name == "paper":
        phase = rng.uniform(0, 0.125)
        for row in range(8):
            y = (row / 8 + phase) * side
            draw.line((0, y, side, y), (160, 190, 225), side // 80)
    else:
        for x, y in rng.uniform(0, side, (3, 2)):
            for dx, dy in ((-0.06, 0.0), (0.0, -0.025), (0.06, 0.0)):
                _dot(draw, x + dx * side, y + dy * side, side * 0.06, (250, 251, 253))
    return canvas


def _gradient(top: tuple[int, ...], bottom: tuple[int, ...], side: int) -> Image.Image:
    strip = np.linspace(top, bottom, 32).round().astype(np.uint8)[:, None]
    return Image.fromarray(strip).resize((side, side), Image.Resampling.BILINEAR)


def _tint(rng: np.random.Generator, rgb: tuple[int, ...], spread: int) -> tuple[int, ...]:
    jittered = np.array(rgb) + rng.integers(-spread, spread + 1, 3)
    return tuple(jittered.clip(0, 255).tolist())


def _dot(
    draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)


def _draw_object(
    canvas: Image.Image, obj: SceneObject, side: int, rng: np.random.Generator
) -> None:
    color = _tint(rng, _RGB[obj.color], _COLOR_JITTER)
    # Of rectangles only; always drawn, so that shapes can be swapped.
    aspect = rng.uniform(0.75, 1.3)
    extent = max(8, round(obj.diameter * side))
    mask = _shape_mask(obj.shape, extent, aspect)
    fill = _textured(obj.texture, color, extent, rng)
    corner = (round(obj.x * side - extent / 2), round(obj.y * side - extent / 2))
    canvas.paste(fill, corner, mask)


def _textured(
    texture: str, color: tuple[int, ...], extent: int, rng: np.random.Generator
) -> Image.Image:
    """A square of ``color``; its marks are a much lighter (of dark colors) or darker tone."""
    fill = Image.new("RGB", (extent, extent), color)
    phase = rng.uniform(0, 1)
    if texture == "solid":
        return fill
    draw = ImageDraw.Draw(fill)
    mark = tuple(round(v + (255 - v) * 0.6) for v in color)
    step = max(extent / 5, 12.0)
    count = math.ceil(extent / step) + 1
    if texture == "striped":
        for i in range(-1, count):
            y = (i + phase) * step
            draw.rectangle((0, y, extent, y + step * 0.42), mark)
        return fill
    for i in range(-1, count):
        for j in range(-1, count):
            x, y = (i + phase) * step, (j + phase) * step
            if texture == "dotted":
                _dot(draw, x, y, step * 0.27, mark)
            elif (i + j) % 2:
                draw.rectangle((x, y, x + step, y + step), mark)
    return fill


def _shape_mask(shape: str, extent: int, aspect: float) -> Image.Image:
    """The shape's silhouette, ``(extent, extent)``, 255 inside."""
    mask = Image.new("L", (extent, extent), 0)
    draw = ImageDraw.Draw(mask)
    last, half = extent - 1, extent / 2
    if shape == "circle":
        draw.ellipse((0, 0, last, last), 255)
    elif shape == "ring":
        draw.ellipse((0, 0, last, last), 255)
        draw.ellipse((extent * 0.27, extent * 0.27, extent * 0.73, extent * 0.73), 0)
    elif shape == "rectangle":
        width, height = min(1.0, aspect), min(1.0, 1 / aspect)
        inset_x, inset_y = extent * (1 - 0.92 * width) / 2, extent * (1 - 0.92 * height) / 2
        draw.rectangle((inset_x, inset_y, last - inset_x, last - inset_y), 255)
    elif shape == "heart":
        draw.polygon(_heart_outline(extent), 255)
    elif shape == "cross":
        arm = extent * 0.32
        draw.rectangle((half - arm / 2, 0, half + arm / 2, last), 255)
        draw.rectangle((0, half - arm / 2, last, half + arm / 2), 255)
    else:
        points = {
            "triangle": [(half, extent * 0.06), (last, extent * 0.92), (0, extent * 0.92)],
            "diamond": [(half, 0), (last * 0.9, half), (half, last), (extent * 0.1, half)],
            "star": _star_outline(extent),
        }[shape]
        draw.polygon(points, 255)
    return mask


def _star_outline(extent: int) -> list[tuple[float, float]]:
    center, outer, inner = extent / 2, extent / 2, extent * 0.21
    return [
        (center + r * math.sin(math.pi * k / 5), center - r * math.cos(math.pi * k / 5))
        for k, r in enumerate([outer, inner] * 5)
    ]


def _heart_outline(extent: int) -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 48)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    scale = extent / 34
    outline = np.stack([extent / 2 + x * scale, extent * 0.46 - y * scale], axis=1)
    return [(float(a), float(b)) for a, b in outline]
