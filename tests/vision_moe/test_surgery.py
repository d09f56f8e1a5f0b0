import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import vision_moe
from vision_moe import CLIPMoEModel, InputError


def timm_vit(**options: Any) -> torch.nn.Module:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(**{**arguments, "num_classes": 0, **options})


def test_open_clip_ffns_are_found(dense_clip: CLIPMoEModel) -> None:
    sites = vision_moe.find_ffns(dense_clip.visual)
    found = [(site.name, site.layer_index, site.width) for site in sites]
    assert found == [(f"transformer.resblocks.{i}.mlp", i, 32) for i in range(3)]


def test_timm_vit_ffns_are_found() -> None:
    names = [site.name for site in vision_moe.find_ffns(timm_vit())]
    assert names == ["blocks.0.mlp", "blocks.1.mlp"]


@pytest.mark.parametrize(
    "layer", [timm.layers.SwiGLU, timm.layers.GluMlp, timm.layers.SwiGLUPacked]
)
def test_gated_ffns_are_found(layer: Any) -> None:
    assert len(vision_moe.find_ffns(timm_vit(mlp_layer=layer))) == 2


def test_timm_swin_ffns_have_the_width_of_their_stage() -> None:
    swin = timm.models.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4
    )
    assert [site.width for site in vision_moe.find_ffns(swin)] == [8, 16]


#: Of Hugging Face's encoders.
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def test_hugging_face_ffns_are_found() -> None:
    clip = CLIPVisionModel(CLIPVisionConfig(**SMALL))
    siglip = SiglipVisionModel(SiglipVisionConfig(**SMALL))
    for model in (clip, siglip):
        names = [site.name.rsplit("encoder.", 1)[1] for site in vision_moe.find_ffns(model)]
        assert names == ["layers.0.mlp", "layers.1.mlp"]


class SquareAttention(torch.nn.Module):
    """Two linear layers of a feed-forward network's shape, and what mixes tokens between them."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.value = torch.nn.Linear(width, width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ x.mT).softmax(-1) @ self.value(x))


def test_ffns_as_wide_as_the_tower_are_told_from_attention() -> None:
    vit = timm_vit(mlp_ratio=1)
    for block in vit.blocks:
        block.attn = SquareAttention()
    names = [site.name for site in vision_moe.find_ffns(vit)]
    assert names == ["blocks.0.mlp", "blocks.1.mlp"]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (timm_vit(), ["blocks.0.attn", "blocks.1.attn"]),
        (
            CLIPVisionModel(CLIPVisionConfig(**SMALL)),
            ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"],
        ),
    ],
)
def test_attention_beside_ffns_is_found(model: torch.nn.Module, names: list[str]) -> None:
    sites = vision_moe.find_ffns(model)
    found = [name for site in sites for name in vision_moe.attention_beside(model, site)]
    assert [name.removeprefix("vision_model.") for name in found] == names


def test_open_clips_attention_is_found(dense_clip: CLIPMoEModel) -> None:
    site = vision_moe.find_ffns(dense_clip)[0]
    found = vision_moe.attention_beside(dense_clip, site)
    assert list(found) == ["visual.transformer.resblocks.0.attn"]
    assert found["visual.transformer.resblocks.0.attn"] is (
        dense_clip.visual.transformer.resblocks[0].attn
    )


def test_identical_experts_match_a_dense_timm_vit() -> None:
    dense = timm_vit().eval()
    moe = copy.deepcopy(dense)
    vision_moe.insert_moe(moe, [0, 1], num_experts=3, top_k=2)
    x = torch.randn(2, 3, 32, 32)
    # Worst error measured: 5e-7.
    torch.testing.assert_close(moe(x), dense(x), atol=1e-5, rtol=0)


def test_identical_experts_match_dense_clip(
    dense_clip: CLIPMoEModel, pixel_values: Tensor, tokens: Tensor
) -> None:
    image, text = dense_clip.encode_image(pixel_values), dense_clip.encode_text(tokens)
    base = vision_moe.ffn_state_dict(dense_clip)
    moe = vision_moe.upcycle(dense_clip, [base] * 4, top_k=2)
    # Worst errors measured: 2.7e-7, 7.2e-7.
    torch.testing.assert_close(moe.encode_image(pixel_values), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(moe.encode_text(tokens), text, atol=1e-5, rtol=0)


def test_expert_has_the_weights_of_its_stage(dense_clip: CLIPMoEModel, perturb) -> None:
    base = vision_moe.ffn_state_dict(dense_clip)
    stage = perturb(base, 1)
    moe = vision_moe.upcycle(dense_clip, [base, stage], top_k=1)
    name = "text.transformer.resblocks.1.mlp"
    expert = moe.get_submodule(name).experts[1]
    assert torch.equal(expert.c_proj.weight, stage[f"{name}.c_proj.weight"])


def test_upcycling_chosen_layers_leaves_the_others_dense(dense_clip: CLIPMoEModel) -> None:
    base = vision_moe.ffn_state_dict(dense_clip)
    moe = vision_moe.upcycle(dense_clip, [base] * 2, 1, vision_layers=[2], text_layers=[])
    assert list(vision_moe.moe_layers(moe)) == ["visual.transformer.resblocks.2.mlp"]
    assert [site.layer_index for site in vision_moe.find_ffns(moe.visual)] == [0, 1]
    assert moe.config.moe == {
        "num_experts": 2,
        "top_k": 1,
        "vision_layers": [2],
        "text_layers": [],
    }


def test_ffn_weights_can_be_loaded_back(dense_clip: CLIPMoEModel, perturb, tokens: Tensor) -> None:
    before = dense_clip.encode_text(tokens)
    base = vision_moe.ffn_state_dict(dense_clip)
    vision_moe.load_ffn_state_dict(dense_clip, perturb(base, 1))
    assert not torch.equal(dense_clip.encode_text(tokens), before)
    vision_moe.load_ffn_state_dict(dense_clip, base)
    assert torch.equal(dense_clip.encode_text(tokens), before)


def test_unknown_layer_is_refused_before_anything_changes(dense_clip: CLIPMoEModel) -> None:
    base = vision_moe.ffn_state_dict(dense_clip)
    with pytest.raises(InputError, match=r"layer\(s\) \[9\] of TextTransformer"):
        vision_moe.upcycle(dense_clip, [base] * 2, 1, text_layers=[9])
    assert not vision_moe.moe_layers(dense_clip)


def test_incomplete_expert_is_refused(dense_clip: CLIPMoEModel) -> None:
    base = vision_moe.ffn_state_dict(dense_clip)
    lacking = {k: v for k, v in base.items() if not k.startswith("text.")}
    with pytest.raises(InputError, match="expert 1: no weights for text"):
        vision_moe.upcycle(dense_clip, [base, lacking], 1)


def test_a_mixture_is_not_upcycled_again(moe_clip: CLIPMoEModel) -> None:
    with pytest.raises(InputError, match="already"):
        vision_moe.upcycle(moe_clip, [{}], 1)
