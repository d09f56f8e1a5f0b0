"""Retrieval and factor accuracy of CLIPs whose answers are known beforehand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mllm.scenes import FACTORS
from train import clip_evaluation
from train.clip_evaluation import evaluate_clip
from vision_moe import CLIPMoEModel

WIDTH = 64


class CaptionReader:
    """A CLIP whose text features are a random direction for each caption, and whose image features
    are ``sign`` times those of the picture's caption."""

    device = torch.device("cpu")

    def __init__(self, sign: float) -> None:
        self.sign = sign
        self.captions: list[str] = []
        self.config = SimpleNamespace(
            open_clip_config={"vision_cfg": {"image_size": 32}},
            preprocess={"mean": [0.5] * 3, "std": [0.5] * 3},
        )

    def tokenizer(self, captions: list[str]) -> Tensor:
        """``(M, 1)``: the caption's number."""
        new = [caption for caption in captions if caption not in self.captions]
        self.captions += dict.fromkeys(new)
        return torch.tensor([[self.captions.index(caption)] for caption in captions])

    def encode_text_by_length(self, tokens: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(int(number)) for number in tokens[:, 0]]
        return torch.stack([torch.randn(WIDTH, generator=one) for one in generators])


def encode_pairs(model: CaptionReader, pairs: Any, _precision: str) -> tuple[Tensor, Tensor]:
    text = model.encode_text_by_length(pairs.tokens(np.arange(len(pairs))))
    return model.sign * text, text


@pytest.fixture
def features_of_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_evaluation, "encode_all", encode_pairs)


@pytest.mark.usefixtures("features_of_captions")
@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, 0.0)])
def test_every_factor_is_told_apart_or_none_is(sign: float, expected: float) -> None:
    result = evaluate_clip(CaptionReader(sign), num_pairs=60)  # type: ignore[arg-type]
    assert result["factors"] == dict.fromkeys(FACTORS, expected)


@pytest.mark.usefixtures("features_of_captions")
@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, 0.0)])
def test_retrieval_finds_every_pair_or_none(sign: float, expected: float) -> None:
    result = evaluate_clip(CaptionReader(sign), num_pairs=60)  # type: ignore[arg-type]
    assert result["retrieval"]["i2t_r1"] == result["retrieval"]["t2i_r1"] == expected


def test_real_clip_gives_the_same_figures_for_a_seed(clip: CLIPMoEModel) -> None:
    first, second = (evaluate_clip(clip, num_pairs=12, seed=3) for _ in range(2))
    assert first["retrieval"] == second["retrieval"]
    assert repr(first["factors"]) == repr(second["factors"])  # a factor that is in none is NaN
