"""Features of pictures and texts, in batches."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vision_moe import CLIPMoEModel, InputError, encode_images, encode_texts, open_image


def openers(folder: Path, number: int, damaged: tuple[int, ...] = ()) -> list[Any]:
    paths = [folder / f"{index}.png" for index in range(number)]
    for index, path in enumerate(paths):
        Image.new("RGB", (32, 32), (index, 255 - index, 0)).save(path)
        if index in damaged:
            path.write_bytes(b"no picture")
    return [partial(open_image, path) for path in paths]


def test_pictures_do_not_depend_on_their_batch(moe_clip: CLIPMoEModel, tmp_path: Path) -> None:
    pictures = openers(tmp_path, 7)
    whole = encode_images(moe_clip, pictures, progress=False)
    parts = encode_images(moe_clip, pictures, batch_size=3, progress=False)
    # Worst error measured: 7.2e-7.
    torch.testing.assert_close(whole.features, parts.features, atol=1e-5, rtol=0)
    pixel_values = torch.stack([moe_clip.preprocess(one()) for one in pictures])
    expected = moe_clip.encode_image(pixel_values).detach()
    torch.testing.assert_close(whole.features, expected, atol=1e-5, rtol=0)


def test_unreadable_picture_is_left_out_and_listed(
    dense_clip: CLIPMoEModel, tmp_path: Path
) -> None:
    images = encode_images(dense_clip, openers(tmp_path, 100, (1,)), progress=False)
    assert images.numbers.tolist() == [0, *range(2, 100)]
    assert len(images.features) == 99
    assert list(images.skipped) == [1] and "1.png" in images.skipped[1]


def test_more_than_one_unreadable_in_a_hundred_is_an_error(
    dense_clip: CLIPMoEModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"2 of 100 pictures cannot be read.*1\.png"):
        encode_images(dense_clip, openers(tmp_path, 100, (1, 5)), progress=False)


def test_no_pictures_are_an_error(dense_clip: CLIPMoEModel) -> None:
    with pytest.raises(InputError, match="no pictures"):
        encode_images(dense_clip, [], progress=False)


def test_texts_keep_their_order_whatever_their_lengths(moe_clip: CLIPMoEModel) -> None:
    texts = ["a red circle on a green field", "a ring", "two", "a blue cross and a star", "a"]
    expected = moe_clip.encode_text(moe_clip.tokenizer(texts)).detach()
    features = encode_texts(moe_clip, texts, batch_size=2, progress=False)
    # Worst error measured: 9.5e-7.
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
