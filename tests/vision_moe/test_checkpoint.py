import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

import vision_moe
from vision_moe import CLIPMoEConfig, CLIPMoEModel, InputError


@pytest.fixture
def folder(moe_clip: CLIPMoEModel, tmp_path: Path) -> Path:
    vision_moe.save(moe_clip, tmp_path / "clip")
    return tmp_path / "clip"


def test_folder_holds_what_the_interface_names(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_round_trip_is_exact(
    folder: Path, moe_clip: CLIPMoEModel, pixel_values: Tensor, tokens: Tensor
) -> None:
    loaded = vision_moe.load(folder)
    assert torch.equal(loaded.encode_image(pixel_values), moe_clip.encode_image(pixel_values))
    assert torch.equal(loaded.encode_text(tokens), moe_clip.encode_text(tokens))
    assert torch.equal(loaded.logit_scale, moe_clip.logit_scale)
    assert not loaded.training


def test_dense_round_trip_is_exact(
    dense_clip: CLIPMoEModel, tokens: Tensor, tmp_path: Path
) -> None:
    vision_moe.save(dense_clip, tmp_path / "clip")
    loaded = vision_moe.load(tmp_path / "clip")
    assert torch.equal(loaded.encode_text(tokens), dense_clip.encode_text(tokens))


def test_causal_mask_survives_building_on_the_meta_device(
    folder: Path, moe_clip: CLIPMoEModel
) -> None:
    # It is not in the file, and transformers builds on the meta device.
    loaded = CLIPMoEModel.from_pretrained(folder)
    assert torch.equal(loaded.text.attn_mask, moe_clip.text.attn_mask)


def test_auto_model_reads_the_folder(
    folder: Path, moe_clip: CLIPMoEModel, tokens: Tensor
) -> None:
    loaded = AutoModel.from_pretrained(folder)
    assert isinstance(loaded, CLIPMoEModel)
    assert torch.equal(loaded.encode_text(tokens), moe_clip.encode_text(tokens))


def test_config_round_trips(folder: Path, moe_clip: CLIPMoEModel) -> None:
    loaded = AutoConfig.from_pretrained(folder)
    assert isinstance(loaded, CLIPMoEConfig)
    for name in ("open_clip_config", "moe", "preprocess"):
        assert getattr(loaded, name) == getattr(moe_clip.config, name)


def test_half_precision_is_kept(moe_clip: CLIPMoEModel, tmp_path: Path) -> None:
    vision_moe.save(moe_clip.bfloat16(), tmp_path / "clip")
    loaded = vision_moe.load(tmp_path / "clip")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_saving_replaces_the_folder(folder: Path, dense_clip: CLIPMoEModel) -> None:
    (folder / "leftover").touch()
    vision_moe.save(dense_clip, folder)
    assert not (folder / "leftover").exists()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        vision_moe.load(tmp_path / "none")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config.json"):
        vision_moe.load(tmp_path)


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        vision_moe.load(folder)


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "[]", "{}"])
def test_foreign_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match="model_type is"):
        vision_moe.load(folder)


def test_vision_folder_is_recognised(moe_clip: CLIPMoEModel, tmp_path: Path) -> None:
    moe_clip.to_vision_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="vision tower alone"):
        vision_moe.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("moe", {"num_experts": 4}, "moe lacks text_layers, top_k, vision_layers"),
        ("open_clip_config", {"embed_dim": 4}, "open_clip_config lacks text_cfg, vision_cfg"),
        (
            "open_clip_config",
            {"embed_dim": 4, "vision_cfg": {"depth": 1}, "text_cfg": {}},
            "no model can be built",
        ),
    ],
)
def test_unusable_config(folder: Path, field: str, value: object, message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError, match=message):
        vision_moe.load(folder)


@pytest.mark.parametrize("num_bytes", [0, 5, 500, -1])
def test_truncated_weights(folder: Path, num_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        vision_moe.load(folder)


def test_pickle_in_place_of_the_weights(folder: Path, moe_clip: CLIPMoEModel) -> None:
    torch.save(moe_clip.state_dict(), folder / "model.safetensors")
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        vision_moe.load(folder)


def test_pickle_beside_missing_weights(folder: Path, moe_clip: CLIPMoEModel) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(moe_clip.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle, which is not read"):
        vision_moe.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.proj"), "visual.proj is missing"),
        (lambda state: state.update(stray=torch.zeros(1)), "stray does not belong"),
        (
            lambda state: state.update({"visual.proj": torch.zeros(2, 2)}),
            r"visual.proj has shape \(2, 2\), config.json says \(32, 16\)",
        ),
    ],
)
def test_weights_of_another_model(folder: Path, change, message: str) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(InputError, match=message):
        vision_moe.load(folder)


def test_from_pretrained_refuses_missing_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["visual.proj"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 weights are missing, visual.proj first"):
        CLIPMoEModel.from_pretrained(folder)
