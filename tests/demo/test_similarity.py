"""Captions against a picture."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from demo.similarity_tab import MAX_CAPTIONS, similarities
from vision_moe import InputError

PICTURE = Image.linear_gradient("L").convert("RGB")


@torch.inference_mode()
def test_similarity_is_the_cosine_of_the_features(clip):
    captions = ["a red circle", "two blue squares"]
    found = similarities({"CLIP-MoE": clip}, PICTURE, captions)["CLIP-MoE"]
    image = clip.encode_image(clip.preprocess(PICTURE)[None])
    text = clip.encode_text(clip.tokenizer(captions))
    expected = torch.nn.functional.cosine_similarity(image, text).tolist()
    assert found["cosine"] == pytest.approx(expected, abs=1e-6)
    assert sum(found["probability"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "no caption"),
        ([" "], "no caption"),
        (["a"] * (MAX_CAPTIONS + 1), "up to 64"),
        (["a" * 9999], "2,000 characters"),
    ],
)
def test_captions_that_do_not_do_are_refused(clip, captions, message):
    with pytest.raises(InputError, match=message):
        similarities({"CLIP-MoE": clip}, PICTURE, captions)
