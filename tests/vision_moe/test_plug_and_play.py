"""A CLIP-MoE where others expect a CLIP: transformers' Auto classes, pipelines and hub, and towers
as the original LLaVA and TinyLLaVA hold them."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    pipeline,
)

import vision_moe
from vision_moe import CLIPMoEModel, CLIPMoEVisionConfig, CLIPMoEVisionModel

TEXTS = [
    "a red circle",
    "Two  SMALL blue squares, on a green field!",
    "it's 3 o'clock; don't",
    "café naïve",
]


@pytest.fixture
def folder(moe_clip: CLIPMoEModel, tmp_path: Path) -> Path:
    vision_moe.save(moe_clip, tmp_path / "clip_moe")
    return tmp_path / "clip_moe"


@pytest.fixture
def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((40, 56))


@pytest.mark.parametrize("text", TEXTS)
def test_auto_tokenizer_gives_the_same_tokens(
    folder: Path, moe_clip: CLIPMoEModel, text: str
) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    ours = moe_clip.tokenizer([text])[0]
    assert theirs == ours[: len(theirs)].tolist() and not ours[len(theirs) :].any()


def test_auto_tokenizer_cuts_at_the_context(folder: Path, moe_clip: CLIPMoEModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer("red " * 50, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(theirs, moe_clip.tokenizer(["red " * 50]))


def test_padding_of_auto_tokenizer_does_not_count(folder: Path, moe_clip: CLIPMoEModel) -> None:
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        features = moe_clip(**inputs).text_features
        # Worst error measured: 4e-7.
        torch.testing.assert_close(
            features, moe_clip.encode_text(moe_clip.tokenizer(TEXTS)), atol=5e-6, rtol=0
        )


def test_logits_are_scaled_cosines(
    moe_clip: CLIPMoEModel, pixel_values: Tensor, tokens: Tensor
) -> None:
    with torch.no_grad():
        output = moe_clip(pixel_values=pixel_values[:2], input_ids=tokens)
        image = moe_clip.encode_image(pixel_values[:2], normalize=True)
        text = moe_clip.encode_text(tokens, normalize=True)
        expected = moe_clip.logit_scale.exp() * image @ text.T
        # Worst error measured: 2e-6 of logits up to 14.
        torch.testing.assert_close(output.logits_per_image, expected, atol=2e-5, rtol=0)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    assert moe_clip(pixel_values=pixel_values).logits_per_image is None


def test_zero_shot_pipeline_opens_the_folder(
    folder: Path, picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = ["circle", "square", "star"]
    with caplog.at_level(logging.ERROR):
        answers = classify(picture, candidate_labels=labels, hypothesis_template="a {}")
    assert not caplog.records
    clip = vision_moe.load(folder)
    with torch.no_grad():
        tokens = clip.tokenizer([f"a {label}" for label in labels])
        logits = clip(pixel_values=clip.preprocess(picture)[None], input_ids=tokens)
    scores = dict(zip(labels, logits.logits_per_image[0].softmax(0).tolist(), strict=True))
    # The picture is resized by another library: worst error measured 2e-3.
    assert {one["label"]: one["score"] for one in answers} == pytest.approx(scores, abs=0.02)


def test_auto_class_for_zero_shot_classification(folder: Path) -> None:
    model = AutoModelForZeroShotImageClassification.from_pretrained(folder)
    assert isinstance(model, CLIPMoEModel)


class LocalHub:
    """What of the hub's client ``push_to_hub`` uses, on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        (self.folder / repo_id).mkdir(parents=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: Any, **_: Any) -> None:
        for operation in operations:
            target = self.folder / repo_id / operation.path_in_repo
            shutil.copy(operation.path_or_fileobj, target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    api = LocalHub(tmp_path / "hub")
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: api)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    return api.folder


def test_pushed_model_comes_back(
    moe_clip: CLIPMoEModel, hub: Path, pixel_values: Tensor, tokens: Tensor
) -> None:
    moe_clip.push_to_hub("me/clip-moe")
    for loaded in (AutoModel.from_pretrained(hub / "me/clip-moe"),
                   vision_moe.load(hub / "me/clip-moe")):  # fmt: skip
        assert torch.equal(loaded.encode_image(pixel_values), moe_clip.encode_image(pixel_values))
        assert torch.equal(loaded.encode_text(tokens), moe_clip.encode_text(tokens))
    assert AutoTokenizer.from_pretrained(hub / "me/clip-moe").model_max_length == 16
    processor = AutoImageProcessor.from_pretrained(hub / "me/clip-moe")
    assert processor.crop_size["height"] == 32


def test_pushed_tower_comes_back(moe_clip: CLIPMoEModel, hub: Path, pixel_values: Tensor) -> None:
    tower = moe_clip.to_vision_model()
    tower.push_to_hub("me/tower")
    loaded = AutoModel.from_pretrained(hub / "me/tower")
    assert torch.equal(loaded(pixel_values).pooler_output, tower(pixel_values).pooler_output)


class OriginalLlavaTower(nn.Module):
    """How the original LLaVA's ``CLIPVisionTower`` uses the classes that it imports."""

    vision_model_class: Any = CLIPVisionModel
    config_class: Any = CLIPVisionConfig

    def __init__(self, name: str) -> None:
        super().__init__()
        self.cfg_only = self.config_class.from_pretrained(name)
        self.image_processor = CLIPImageProcessor.from_pretrained(name)
        self.vision_tower = self.vision_model_class.from_pretrained(name, device_map=None)
        self.vision_tower.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        tower = self.vision_tower
        output = tower(images.to(tower.device, tower.dtype), output_hidden_states=True)
        return output.hidden_states[-2][:, 1:].to(images.dtype)


def test_original_llava_tower_takes_a_clip_moe(
    folder: Path, moe_clip: CLIPMoEModel, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OriginalLlavaTower, "vision_model_class", CLIPMoEVisionModel)
    monkeypatch.setattr(OriginalLlavaTower, "config_class", CLIPMoEVisionConfig)
    tower = OriginalLlavaTower(str(folder))
    images = tower.image_processor(picture, return_tensors="pt")["pixel_values"]
    states = moe_clip.to_vision_model()(images, output_hidden_states=True).hidden_states
    # Frozen weights take another path through attention: worst error measured 7e-7.
    torch.testing.assert_close(tower(images), states[-2][:, 1:], atol=1e-5, rtol=0)
    config = tower.cfg_only
    assert (config.image_size // config.patch_size) ** 2 == tower(images).shape[1]
    assert config.hidden_size == tower(images).shape[2]


def test_tinyllava_tower_takes_a_clip_moe(
    folder: Path, moe_clip: CLIPMoEModel, pixel_values: Tensor
) -> None:
    # TinyLLaVA builds from a configuration and then loads through the instance.
    built = CLIPMoEVisionModel(CLIPMoEVisionConfig.from_pretrained(folder))
    tower = built.from_pretrained(folder)
    output = tower(pixel_values, output_hidden_states=True).hidden_states[-2]
    expected = moe_clip.to_vision_model()(pixel_values, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(output, expected)
