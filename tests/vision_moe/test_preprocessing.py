import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import vision_moe
from vision_moe import CLIPMoEConfig, CLIPMoEModel, InputError, open_image, to_rgb


def photograph(height: int, width: int) -> Image.Image:
    """Smooth, with a few edges, as photographs are."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 15)]
    pixels = np.stack(waves, -1) * 100 + 128
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, file_format: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [32, 20, 100])
def test_preprocess_equals_the_saved_image_processor(
    tiny_config: dict[str, Any], tmp_path: Path, resize_mode: str, interpolation: str, side: int
) -> None:
    preprocess = {"resize_mode": resize_mode, "interpolation": interpolation}
    clip = CLIPMoEModel(CLIPMoEConfig(open_clip_config=tiny_config, preprocess=preprocess))
    vision_moe.save(clip, tmp_path / "clip")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "clip")
    image = photograph(side, side)
    ours = clip.preprocess(image)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    # PIL and torchvision round resized pixels apart, by one level of 255 at most.
    std = torch.tensor(clip.config.preprocess["std"])[:, None, None]
    # Worst error measured: 1.0000005 levels; 1.2e-5 where nothing is resized.
    levels = (ours - theirs).abs() * std * 255
    assert levels.max() <= (0.01 if side == 32 else 1.01)


def test_image_processor_sizes_are_those_of_the_tower(
    dense_clip: CLIPMoEModel, tmp_path: Path
) -> None:
    vision_moe.save(dense_clip, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
    assert config["size"] == {"shortest_edge": 32}
    assert config["crop_size"] == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("option", "message"),
    [({"resize_mode": "longest"}, "resize_mode"), ({"interpolation": "x"}, "interpolation")],
)
def test_unknown_preprocessing_is_refused(
    tiny_config: dict[str, Any], option: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CLIPMoEModel(CLIPMoEConfig(open_clip_config=tiny_config, preprocess=option))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F"]
)
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (5, 4))).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_over_white(mode: str) -> None:
    image = Image.new(mode, (2, 2))                         # black, but wholly transparent
    assert open_image(saved(image, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_entry_is_over_white() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    file = saved(image, "PNG", transparency=1)
    assert open_image(file).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_to_eight() -> None:
    image = Image.fromarray(np.full((2, 2), 128 * 257, dtype=np.uint16))
    assert open_image(saved(image, "PNG")).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6                                        # lying on its side
    assert open_image(saved(Image.new("RGB", (6, 2)), "JPEG", exif=exif)).size == (2, 6)


def test_damaged_exif_does_not_matter() -> None:
    file = saved(Image.new("RGB", (6, 2)), "JPEG", exif=b"Exif\x00\x00garbage")
    assert open_image(file).size == (6, 2)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_image_is_an_input_error(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content = saved(Image.fromarray(noise), file_format).getvalue()
    with pytest.raises(InputError, match="the image"):
        open_image(io.BytesIO(content[: int(len(content) * share)]))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.png: no such file"):
        open_image(tmp_path / "none.png")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff"]
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(InputError, match="file.png: .*read"):
        open_image(tmp_path / "file.png")


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="too large"):
        open_image(saved(Image.new("RGB", (11, 11)), "PNG"))
    with pytest.raises(InputError, match="too large"):
        open_image(saved(Image.new("RGB", (50, 50)), "PNG"))


def test_strip_is_refused() -> None:
    with pytest.raises(InputError, match="1x1000 is too elongated"):
        open_image(saved(Image.new("RGB", (1, 1000)), "PNG"))
