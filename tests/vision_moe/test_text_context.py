"""Stretching the text context."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import vision_moe
from vision_moe import CLIPMoEModel, InputError
from vision_moe.text_context import stretch_positions


def test_77_positions_become_long_clips_248() -> None:
    p = torch.randn(77, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new = stretch_positions(p, 248)
    expected = torch.empty(248, 4, dtype=torch.float64)
    expected[:20] = p[:20]
    for i in range(56):
        for r in range(4):
            expected[20 + 4 * i + r] = ((4 - r) * p[20 + i] + r * p[21 + i]) / 4
    for r in range(4):
        expected[244 + r] = p[76] + r * (p[76] - p[75]) / 4
    torch.testing.assert_close(new, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("before", "after"), [(64, 248), (76, 248), (32, 33), (30, 30)])
def test_any_table_of_a_straight_line_stays_one(before: int, after: int) -> None:
    line = torch.arange(before, dtype=torch.float32).unsqueeze(-1)
    new = stretch_positions(line, after)
    assert new.shape == (after, 1)
    torch.testing.assert_close(new[:20], line[:20])
    step = (before - 20) / (after - 20)
    expected = 20 + step * torch.arange(after - 20)
    torch.testing.assert_close(new[20:, 0], expected.float(), atol=1e-4, rtol=0)


def clip_of(tiny_config: dict, **text: object) -> CLIPMoEModel:
    torch.manual_seed(0)
    description = {**tiny_config, "text_cfg": {**tiny_config["text_cfg"], **text}}
    return CLIPMoEModel(vision_moe.CLIPMoEConfig(open_clip_config=description)).eval()


@torch.no_grad()
@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True, "pool_type": "last"},
                                  {"embed_cls": True}])  # fmt: skip
def test_stretched_clip_reads_long_texts_and_loads_again(
    tiny_config: dict, text: dict, tmp_path: Path
) -> None:
    clip = clip_of(tiny_config, context_length=40, **text)
    vision_moe.stretch_text_context(clip, 100)
    tokens = clip.tokenizer(["word " * 90, "a cat"])
    assert tokens.shape == (2, 100)
    changed = tokens.clone()
    changed[0, 80] = 7
    features = clip.encode_text(tokens)
    assert not torch.allclose(features[0], clip.encode_text(changed)[0], atol=1e-5)
    vision_moe.save(clip, tmp_path / "clip")
    assert torch.equal(vision_moe.load(tmp_path / "clip").encode_text(tokens), features)


@torch.no_grad()
def test_short_texts_keep_their_features(tiny_config: dict) -> None:
    clip = clip_of(tiny_config, context_length=40)
    texts = ["a red circle", "two blue squares on a green field"]
    before = clip.encode_text(clip.tokenizer(texts))
    vision_moe.stretch_text_context(clip, 120)
    # Worst error measured: 0.
    torch.testing.assert_close(clip.encode_text(clip.tokenizer(texts)), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [39, 10])
def test_context_is_not_shortened(tiny_config: dict, length: int) -> None:
    clip = clip_of(tiny_config, context_length=40)
    with pytest.raises(InputError, match=f"40 positions cannot be stretched to {length}"):
        vision_moe.stretch_text_context(clip, length)


def test_short_table_is_refused(dense_clip: CLIPMoEModel, tokens: Tensor) -> None:
    with pytest.raises(InputError, match="16 positions cannot be stretched to 248"):
        vision_moe.stretch_text_context(dense_clip, 248)
