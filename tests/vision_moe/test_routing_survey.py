"""Counting where routers send which kind of token."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vision_moe
from vision_moe import CLIPMoEModel
from vision_moe.routing_survey import (
    CLASS,
    END,
    PATCH,
    WORD,
    num_prefix_tokens,
    patch_grid,
    survey_agreement,
    survey_routing,
)

TEXTS = ["a red circle", "two small blue squares", "!"]
NONE: dict[str, Any] = {}


@pytest.fixture
def pictures() -> list[Any]:
    return [lambda shade=shade: Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 90, 250)]


def test_every_token_is_counted_once(moe_clip: CLIPMoEModel, pictures: list[Any]) -> None:
    survey = survey_routing(moe_clip, pictures, TEXTS, NONE, NONE, batch_size=2)
    assert len(survey) == 5
    num_words = int(moe_clip.tokenizer(TEXTS).ne(0).sum()) - 3
    for block, kinds in survey.items():
        expected = {PATCH: 48, CLASS: 3} if "visual" in block else {WORD: num_words, END: 3}
        assert {kind: one.num_tokens for kind, one in kinds.items()} == expected
        for one in kinds.values():
            assert one.choices.sum() == 2 * one.num_tokens  # top-2
            assert len(np.concatenate(one.first)) == one.num_tokens


def test_counts_are_those_of_the_routers(moe_clip: CLIPMoEModel, pictures: list[Any]) -> None:
    survey = survey_routing(moe_clip, pictures, [], NONE, NONE)
    pixels = torch.stack([moe_clip.preprocess(one()) for one in pictures])
    with vision_moe.record_routing(moe_clip.visual) as record, torch.inference_mode():
        moe_clip.encode_image(pixels)
    for name, load in record.expert_load().items():
        kinds = survey[f"visual.{name}"].values()
        choices = np.sum([one.choices for one in kinds], axis=0)
        np.testing.assert_allclose(choices / choices.sum(), load.numpy(), atol=1e-6)
        probs = record.router_logits[name].softmax(-1)
        entropy = float(-(probs * probs.log()).sum())
        assert sum(one.entropy for one in kinds) == pytest.approx(entropy, rel=1e-4)


def test_end_is_where_the_texts_feature_is_taken(
    moe_clip: CLIPMoEModel, pictures: list[Any]
) -> None:
    survey = survey_routing(moe_clip, pictures[:1], TEXTS, NONE, NONE)
    tokens = moe_clip.tokenizer(TEXTS)
    with vision_moe.record_routing(moe_clip.text) as record, torch.inference_mode():
        moe_clip.encode_text(tokens)
    for name, logits in record.router_logits.items():
        at_end = logits[torch.arange(3), tokens.argmax(-1)].argmax(-1)
        first = np.concatenate(survey[f"text.{name}"][END].first)
        np.testing.assert_array_equal(first, at_end.numpy())


def test_factors_are_counted_by_value(moe_clip: CLIPMoEModel, pictures: list[Any]) -> None:
    factors = {"shade": np.array([1, 0, 1]), "other": np.array([-1, 0, -1])}
    survey = survey_routing(moe_clip, pictures, TEXTS, factors, factors)
    one = next(iter(survey.values()))[PATCH]
    assert one.by_factor["shade"].sum(1).tolist() == [16, 32]
    assert one.by_factor["other"].sum(1).tolist() == [16]
    assert set(one.information()) == {"shade", "other"}


def test_grid_and_class_token_are_found(moe_clip: CLIPMoEModel) -> None:
    assert patch_grid(moe_clip) == (4, 4)
    assert num_prefix_tokens(moe_clip) == 1


def test_model_agrees_with_itself(moe_clip: CLIPMoEModel, pictures: list[Any]) -> None:
    survey = survey_routing(moe_clip, pictures, TEXTS, NONE, NONE)
    assert set(survey_agreement(survey, survey).values()) == {1.0}
