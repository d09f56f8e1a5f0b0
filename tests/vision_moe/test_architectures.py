"""open_clip's architectures, each with few and narrow layers: all of them can be upcycled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import MT5Config, RobertaConfig

import vision_moe
from vision_moe import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionModel, InputError
from vision_moe.modeling import open_clip_description

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
SMALL_VIT = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}

# open_clip model -> what is made smaller: keys of its vision_cfg and text_cfg, and arguments of
# timm's builder.
NATIVE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ViT-B-32": (VIT, TEXT),
    "ViT-L-14-336-quickgelu": (VIT, TEXT),
    "ViT-H-14-CLIPA": (VIT, TEXT),                  # no CLS, sine positions, bidirectional text
    "coca_ViT-B-32": ({**VIT, "attn_pooler_heads": 2}, {**TEXT, "context_length": 11}),
    "coca_base": (VIT, {**TEXT, "context_length": 11}),
}
TIMM: dict[str, dict[str, Any]] = {
    "ViT-B-16-SigLIP2": SMALL_VIT,                  # MAP pooling
    "EVA01-g-14": {**SMALL_VIT, "patch_size": 16},
    "EVA02-B-16": {**SMALL_VIT, "ref_feat_shape": (4, 4)},            # gated FFN with a norm
    "PE-Core-T-16-384": {**SMALL_VIT, "ref_feat_shape": (4, 4), "attn_pool_num_heads": 3},
    "MobileCLIP2-B": {"img_size": 64, "depth": 2},                    # convolutional stem
    "vit_medium_patch16_gap_256": SMALL_VIT,
    "vit_relpos_medium_patch16_cls_224": {**SMALL_VIT, "rel_pos_dim": 16},
    "ViTamin-S": {"img_size": 64, "depth": 2, "num_heads": 6},        # convolutions, then a ViT
    "convnext_base": {"depths": (1, 1, 2, 2), "dims": (8, 16, 24, 32)},  # NHWC maps
    "swin_base_patch4_window7_224": {
        "img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 2),
        "num_heads": (1, 2, 2, 2),
    },
}  # fmt: skip
TOWERS = [*NATIVE, *TIMM]
# Feed-forward networks of the image tower.
NUM_VISION_FFNS = {"convnext_base": 6, "swin_base_patch4_window7_224": 5}

Build = Callable[..., CLIPMoEModel]


def small(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """open_clip's description of a model, with few and narrow layers."""
    description = open_clip_description(name)
    description["embed_dim"] = 16
    if name in NATIVE:
        vision, text = NATIVE[name]
        description["vision_cfg"].update(vision)
        description["text_cfg"].update(text)
        return description
    description["text_cfg"].update(TEXT)
    description["vision_cfg"]["image_size"] = 64
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **kw: create(*a, **{**kw, **TIMM[name]}))
    return description


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    def built(name: str) -> CLIPMoEModel:
        torch.manual_seed(0)
        config = CLIPMoEConfig(open_clip_config=small(name, monkeypatch))
        clip = CLIPMoEModel(config).eval()
        with torch.no_grad():
            # At their start many towers all but skip their blocks, and nothing would be tested.
            for parameter in clip.visual.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return clip

    return built


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts() -> Tensor:
    tokens = torch.zeros(2, 11, dtype=torch.long)
    tokens[0, :4] = torch.tensor([49406, 5, 6, 49407])
    tokens[1, :7] = torch.tensor([49406, 9, 8, 7, 11, 12, 49407])
    return tokens


def copies(clip: CLIPMoEModel, number: int = 3) -> list[dict[str, Tensor]]:
    return [vision_moe.ffn_state_dict(clip)] * number


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_identical_experts_equal_the_dense_model(
    build: Build, name: str, images: Tensor, texts: Tensor, tmp_path: Path
) -> None:
    clip = build(name)
    image, text = clip.encode_image(images), clip.encode_text(texts)
    assert len(vision_moe.find_ffns(clip.visual)) == NUM_VISION_FFNS.get(name, 2)
    assert len(vision_moe.find_ffns(clip.text)) == 2
    moe = vision_moe.upcycle(clip, copies(clip), top_k=2)
    for before, after in ((image, moe.encode_image(images)), (text, moe.encode_text(texts))):
        # Worst error measured, of the largest feature: 7.1e-7.
        torch.testing.assert_close(after, before, atol=1e-5 * float(before.abs().max()), rtol=0)
    with vision_moe.force_expert(moe, 1):
        for layer in vision_moe.moe_layers(moe).values():
            for parameter in layer.experts[1].parameters():
                parameter.zero_()
        change = (moe.encode_image(images) - image).abs().max() / image.abs().max()
    assert change > 0.01                                   # measured: 0.05 to 1.4
    # Loading makes no weights: buffers outside of the file must be there all the same.
    vision_moe.save(moe, tmp_path / "clip")
    loaded = vision_moe.load(tmp_path / "clip")
    assert torch.equal(loaded.encode_image(images), moe.encode_image(images))
    assert torch.equal(loaded.encode_text(texts), moe.encode_text(texts))


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_hidden_states_are_tokens_as_the_configuration_says(
    build: Build, name: str, images: Tensor
) -> None:
    clip = build(name)
    moe = vision_moe.upcycle(clip, copies(clip, 2), top_k=1, text_layers=[])
    tower = moe.to_vision_model()
    output = tower(images, output_hidden_states=True)
    config = tower.config
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    assert len(output.router_logits) == len(vision_moe.moe_layers(tower))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    for state in output.hidden_states[-2:]:
        assert state.shape[2] == config.hidden_size
        # The map's tokens, and at most one more: CLS.
        assert state.shape[1] - (64 // config.patch_size) ** 2 in (0, 1)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2", "EVA02-B-16", "ViTamin-S", "convnext_base",
                                  "swin_base_patch4_window7_224"])  # fmt: skip
def test_gradient_checkpointing_changes_neither_states_nor_gradients(
    build: Build, name: str, images: Tensor
) -> None:
    clip = build(name)
    moe = vision_moe.upcycle(clip, copies(clip, 2), top_k=1, text_layers=[])
    tower = moe.to_vision_model().train()
    forwards: list[nn.Module] = []
    first = next(iter(vision_moe.moe_layers(tower).values()))
    first.register_forward_pre_hook(lambda *_: forwards.append(first))
    states, grads = [], []
    for enable in (False, True):
        tower.gradient_checkpointing = enable
        tower.zero_grad()
        torch.manual_seed(2)                               # towers in stages drop whole paths
        output = tower(images, output_hidden_states=True)
        states.append(output.hidden_states)
        loss = torch.stack([state.square().mean() for state in output.hidden_states]).sum()
        (loss + vision_moe.load_balancing_loss(output.router_logits)).backward()
        grads.append({k: p.grad for k, p in tower.named_parameters() if p.grad is not None})
    assert len(forwards) == 3                              # the second one computes again
    # Worst error measured: 0.
    torch.testing.assert_close(states[1], states[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-5)


def test_tokens_of_a_map_are_read_row_by_row(build: Build, images: Tensor) -> None:
    clip = build("convnext_base")
    tower = clip.to_vision_model()
    with torch.no_grad():
        tokens = tower(images).last_hidden_state
        feature_map = clip.visual.trunk.forward_features(images)                     # (B, D, h, w)
    assert torch.equal(tokens[:, 1], feature_map[:, :, 0, 1])


def test_experts_have_the_width_of_their_stage(build: Build) -> None:
    clip = build("convnext_base")
    moe = vision_moe.upcycle(clip, copies(clip), top_k=1)
    widths = [layer.width for layer in vision_moe.moe_layers(moe.visual).values()]
    assert widths == [8, 16, 24, 24, 32, 32]


@torch.no_grad()
def test_coca_is_held_without_its_captioning_decoder(
    monkeypatch: pytest.MonkeyPatch, images: Tensor, texts: Tensor
) -> None:
    import open_clip

    description = open_clip.get_model_config("coca_ViT-B-32")
    vision, text = NATIVE["coca_ViT-B-32"]
    description["vision_cfg"].update(vision)
    description["text_cfg"].update(text)
    description["multimodal_cfg"].update(
        width=32, heads=2, layers=1, context_length=11, attn_pooler_heads=2
    )
    description.update(embed_dim=32)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "coca_tiny", description)
    torch.manual_seed(0)
    coca = open_clip.create_model("coca_tiny").eval()
    torch.manual_seed(0)
    ours = CLIPMoEModel.from_open_clip("coca_tiny")
    assert torch.equal(ours.encode_image(images), coca.encode_image(images, normalize=False))
    assert torch.equal(ours.encode_text(texts), coca.encode_text(texts, normalize=False))


# --- towers without feed-forward networks of one shape --------------------------------------------


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}


@torch.no_grad()
def test_text_tower_of_a_resnet_is_upcycled(texts: Tensor, images: Tensor) -> None:
    config = CLIPMoEConfig(
        open_clip_config={"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT}
    )
    clip = CLIPMoEModel(config).eval()
    text = clip.encode_text(texts)
    moe = vision_moe.upcycle(clip, copies(clip), top_k=2)
    torch.testing.assert_close(moe.encode_text(texts), text, atol=1e-5, rtol=1e-5)
    assert moe.config.moe is not None and moe.config.moe["vision_layers"] == []
    output = moe.to_vision_model()(images, output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 4, moe.config.vision_config.hidden_size)


def test_convolutional_feed_forward_networks_are_left_dense(
    monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    # MobileCLIP's image tower: between its linear layers stands a convolution over many tokens.
    monkeypatch.setitem(
        TIMM, "MobileCLIP2-S0", {"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64)}
    )
    config = CLIPMoEConfig(open_clip_config=small("MobileCLIP2-S0", monkeypatch))
    clip = CLIPMoEModel(config).eval()
    assert not vision_moe.find_ffns(clip.visual)
    with pytest.raises(InputError, match=r"no dense feed-forward network in layer\(s\) \[0\]"):
        vision_moe.upcycle(clip, copies(clip), vision_layers=[0])
    moe = vision_moe.upcycle(clip, copies(clip))
    assert len(vision_moe.moe_layers(moe)) == 2
    assert len(moe.to_vision_model()(images, output_hidden_states=True).hidden_states) == 5


def test_tower_without_blocks_says_so() -> None:
    vision = {"timm_model_name": "test_resnet", "image_size": 64}
    description = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
    clip = CLIPMoEModel(CLIPMoEConfig(open_clip_config=description)).eval()
    with pytest.raises(InputError, match="ResNet has no blocks whose outputs"):
        clip.to_vision_model()(torch.zeros(1, 3, 64, 64))


# --- text towers of Hugging Face's ----------------------------------------------------------------


def hugging_face_clip(
    folder: Path, config: Any, vision: dict[str, Any] = VIT, **text: Any
) -> CLIPMoEModel:
    config.save_pretrained(folder)
    text_cfg = {"hf_model_name": str(folder), "hf_proj_type": "linear", **text}
    torch.manual_seed(0)
    return CLIPMoEModel(
        CLIPMoEConfig(
            open_clip_config={"embed_dim": 16, "vision_cfg": vision, "text_cfg": text_cfg}
        )
    ).eval()


@torch.no_grad()
def test_t5_text_tower_is_upcycled(tmp_path: Path, texts: Tensor) -> None:
    config = MT5Config(
        vocab_size=49408, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    clip = hugging_face_clip(tmp_path / "t5", config, hf_pooler_type="mean_pooler")
    text = clip.encode_text(texts)
    moe = vision_moe.upcycle(clip, copies(clip), top_k=2)
    assert len(vision_moe.moe_layers(moe.text)) == 2
    torch.testing.assert_close(moe.encode_text(texts), text, atol=1e-5, rtol=1e-5)


ROBERTA = RobertaConfig(
    vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=20,
)  # fmt: skip


@torch.no_grad()
def test_roberta_text_tower_stays_dense(tmp_path: Path, texts: Tensor) -> None:
    # Its feed-forward networks are spread over two modules with a residual between.
    clip = hugging_face_clip(tmp_path / "roberta", ROBERTA)
    moe = vision_moe.upcycle(clip, copies(clip), top_k=2)
    assert list(vision_moe.moe_layers(moe.text)) == []
    assert len(vision_moe.moe_layers(moe.visual)) == 2
    vision_moe.save(moe, tmp_path / "clip")
    loaded = vision_moe.load(tmp_path / "clip")
    assert torch.equal(loaded.encode_text(texts), moe.encode_text(texts))


def test_model_without_feed_forward_networks_is_refused(tmp_path: Path) -> None:
    clip = hugging_face_clip(tmp_path / "roberta", ROBERTA, vision=RESNET)
    with pytest.raises(InputError, match="no feed-forward network was found or chosen"):
        vision_moe.upcycle(clip, copies(clip))


# --- the paper's model ----------------------------------------------------------------------------


def test_paper_counts_of_vit_l_14_336() -> None:
    description = open_clip_description("ViT-L-14-336", "openai")
    everywhere = {"vision_layers": list(range(24)), "text_layers": list(range(12))}
    moe = {"num_experts": 4, "top_k": 2, **everywhere}
    with torch.device("meta"):
        dense = CLIPMoEVisionModel(CLIPMoEConfig(open_clip_config=description).vision_config)
        clip = CLIPMoEModel(CLIPMoEConfig(open_clip_config=description, moe=moe))
    names = [site.name for site in vision_moe.find_ffns(dense.visual)]
    assert names == [f"transformer.resblocks.{i}.mlp" for i in range(24)]
    layers = vision_moe.moe_layers(clip.visual).values()
    idle = sum(layer.num_idle_parameters() for layer in layers)
    total = sum(parameter.numel() for parameter in clip.visual.parameters())
    # The paper: 304 M, 908 M in all, 505 M active.
    assert round(dense.num_parameters() / 1e6) == 304
    assert (round(total / 1e6), round((total - idle) / 1e6)) == (909, 506)
