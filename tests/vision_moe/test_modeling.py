"""Both towers: initialisation, parity with transformers' CLIP, text lengths."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vision_moe import CLIPMoEConfig, CLIPMoEModel, InputError


def to_hugging_face(clip: CLIPMoEModel, hidden_act: str) -> CLIPModel:
    """The same weights in transformers' CLIPModel."""
    description = clip.config.open_clip_config
    vision, text = description["vision_cfg"], description["text_cfg"]
    config = CLIPConfig(
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": hidden_act,
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": hidden_act,
        },
        projection_dim=description["embed_dim"],
    )
    ours = clip.state_dict()
    theirs: dict[str, Tensor] = {
        "logit_scale": ours["logit_scale"],
        "visual_projection.weight": ours["visual.proj"].T,
        "text_projection.weight": ours["text.text_projection"].T,
        "vision_model.embeddings.class_embedding": ours["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": ours["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": ours["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": ours["text.token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": ours["text.positional_embedding"],
    }
    for part in ("weight", "bias"):
        theirs[f"vision_model.pre_layrnorm.{part}"] = ours[f"visual.ln_pre.{part}"]
        theirs[f"vision_model.post_layernorm.{part}"] = ours[f"visual.ln_post.{part}"]
        theirs[f"text_model.final_layer_norm.{part}"] = ours[f"text.ln_final.{part}"]
    for tower, model, layers in (
        ("visual", "vision_model", vision["layers"]),
        ("text", "text_model", text["layers"]),
    ):
        for i in range(layers):
            block, layer = f"{tower}.transformer.resblocks.{i}", f"{model}.encoder.layers.{i}"
            for part in ("weight", "bias"):
                qkv = ours[f"{block}.attn.in_proj_{part}"].chunk(3)
                for name, value in zip("qkv", qkv, strict=True):
                    theirs[f"{layer}.self_attn.{name}_proj.{part}"] = value
                for source, target in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    theirs[f"{layer}.{target}.{part}"] = ours[f"{block}.{source}.{part}"]
    model_hf = CLIPModel(config).eval()
    model_hf.load_state_dict(theirs)
    return model_hf


@pytest.fixture(params=[False, True], ids=["gelu", "quick_gelu"])
def pair(request: Any, tiny_config: dict[str, Any]) -> tuple[CLIPMoEModel, CLIPModel]:
    torch.manual_seed(0)
    config = CLIPMoEConfig(open_clip_config={**tiny_config, "quick_gelu": request.param})
    clip = CLIPMoEModel(config).eval()
    return clip, to_hugging_face(clip, "quick_gelu" if request.param else "gelu")


@torch.no_grad()
def test_hidden_states_equal_clip_vision_model(
    pair: tuple[CLIPMoEModel, CLIPModel], pixel_values: Tensor
) -> None:
    clip, reference = pair
    ours = clip.to_vision_model()(pixel_values, output_hidden_states=True)
    theirs = reference.vision_model(pixel_values, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        # Worst error measured: 7.2e-7.
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=1e-5, rtol=0)


@torch.no_grad()
def test_image_features_equal_clip_model(
    pair: tuple[CLIPMoEModel, CLIPModel], pixel_values: Tensor
) -> None:
    clip, reference = pair
    theirs = reference.visual_projection(reference.vision_model(pixel_values).pooler_output)
    # Worst error measured: 9.6e-7.
    torch.testing.assert_close(clip.encode_image(pixel_values), theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_features_equal_clip_model(
    pair: tuple[CLIPMoEModel, CLIPModel], tokens: Tensor
) -> None:
    clip, reference = pair
    theirs = reference.text_projection(reference.text_model(tokens).pooler_output)
    # Worst error measured: 4.8e-7.
    torch.testing.assert_close(clip.encode_text(tokens), theirs, atol=1e-5, rtol=0)


def test_towers_equal_open_clip(
    dense_clip: CLIPMoEModel, pixel_values: Tensor, tokens: Tensor
) -> None:
    reference = open_clip.CustomTextCLIP(**dense_clip.config.open_clip_config).eval()
    reference.load_state_dict(dense_clip.state_dict())
    assert torch.equal(dense_clip.encode_image(pixel_values), reference.encode_image(pixel_values))
    assert torch.equal(dense_clip.encode_text(tokens), reference.encode_text(tokens))


def test_initialisation_is_open_clips(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(3)
    ours = CLIPMoEModel(CLIPMoEConfig(open_clip_config=tiny_config)).state_dict()
    torch.manual_seed(3)
    theirs = open_clip.CustomTextCLIP(**tiny_config).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_from_open_clip_has_its_weights_and_preprocessing(
    tiny_config: dict[str, Any], tmp_path: Path, pixel_values: Tensor
) -> None:
    (tmp_path / "ViT-Tiny-Test.json").write_text(json.dumps(tiny_config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(5)
    source = open_clip.create_model("ViT-Tiny-Test").eval()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    clip = CLIPMoEModel.from_open_clip("ViT-Tiny-Test", str(tmp_path / "weights.pt"))
    assert torch.equal(clip.encode_image(pixel_values), source.encode_image(pixel_values))


def test_unknown_open_clip_name_is_refused() -> None:
    with pytest.raises(InputError, match="knows no model named 'ViT-Z'"):
        CLIPMoEModel.from_open_clip("ViT-Z")


@torch.no_grad()
def test_texts_encoded_by_length_keep_their_order(moe_clip: CLIPMoEModel, tokens: Tensor) -> None:
    # Worst difference measured: 1.5e-6, as for trimmed tokens.
    torch.testing.assert_close(
        moe_clip.encode_text_by_length(tokens, num_groups=2),
        moe_clip.encode_text(tokens),
        atol=1e-5,
        rtol=0,
    )


def test_trimmed_tokens_give_the_same_features(moe_clip: CLIPMoEModel, tokens: Tensor) -> None:
    trimmed = moe_clip.trim_tokens(tokens)
    assert trimmed.shape == (3, 10)
    # Worst error measured: 1.5e-6.
    torch.testing.assert_close(
        moe_clip.encode_text(trimmed), moe_clip.encode_text(tokens), atol=1e-5, rtol=0
    )


def test_tokens_are_kept_where_padding_counts(tiny_config: dict[str, Any], tokens: Tensor) -> None:
    text = {**tiny_config["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    clip = CLIPMoEModel(CLIPMoEConfig(open_clip_config={**tiny_config, "text_cfg": text}))
    assert torch.equal(clip.trim_tokens(tokens), tokens)


def test_tokenizer_pads_to_the_context_length(dense_clip: CLIPMoEModel) -> None:
    tokens = dense_clip.tokenizer(["a cat", "word " * 100])
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64


def test_forward_returns_both_features_and_router_logits(
    moe_clip: CLIPMoEModel, pixel_values: Tensor, tokens: Tensor
) -> None:
    output = moe_clip(pixel_values=pixel_values, input_ids=tokens)
    assert torch.equal(output.image_features, moe_clip.encode_image(pixel_values))
    assert torch.equal(output.text_features, moe_clip.encode_text(tokens))
    assert len(output.router_logits) == 5


def test_unnormalised_by_default_and_unit_length_on_demand(
    dense_clip: CLIPMoEModel, pixel_values: Tensor
) -> None:
    lengths = dense_clip.encode_image(pixel_values, normalize=True).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(3))


def test_sigmoid_clip_keeps_its_bias(tiny_config: dict[str, Any]) -> None:
    clip = CLIPMoEModel(CLIPMoEConfig(open_clip_config={**tiny_config, "init_logit_bias": -10}))
    assert clip.logit_bias is not None and clip.logit_bias.item() == -10
