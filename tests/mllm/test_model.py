"""Building, saving, loading and changing the MLLM."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)

import mllm as mllm_package
from mllm.building import correct_token_count
from mllm.model import build_llava, load_mllm, replace_vision_tower, save_mllm
from vision_moe import CLIPMoEVisionModel, InputError


def logits(model, processor, image):
    content = [{"type": "image"}, {"type": "text", "text": "is it red?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def image():
    return Image.linear_gradient("L").convert("RGB")


def test_parts_are_taken_over_not_copied(language_model, tokenizer, clip, image_processor):
    tower = clip.to_vision_model()
    model, _ = build_llava(language_model, tokenizer, tower, image_processor)
    assert model.model.language_model is language_model.model
    assert model.model.vision_tower is tower


def test_head_stays_tied_to_embeddings(mllm):
    model, _ = mllm
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_nothing_is_left_on_the_meta_device(mllm):
    assert not any(p.is_meta for p in mllm[0].parameters())
    assert not any(b.is_meta for b in mllm[0].buffers())


def test_stock_classes_load_what_was_saved(mllm, mllm_folder, image):
    model = LlavaForConditionalGeneration.from_pretrained(mllm_folder)
    processor = AutoProcessor.from_pretrained(mllm_folder)
    torch.testing.assert_close(
        logits(model, processor, image), logits(*mllm, image), rtol=0, atol=0
    )


def test_stranger_answers_with_transformers_alone(mllm_folder, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    script = f"""
from transformers import AutoProcessor, LlavaForConditionalGeneration
import vision_moe
model = LlavaForConditionalGeneration.from_pretrained({str(mllm_folder)!r})
processor = AutoProcessor.from_pretrained({str(mllm_folder)!r})
content = [{{"type": "image", "path": {str(tmp_path / "a.png")!r}}},
           {{"type": "text", "text": "is it red?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True, tokenize=True,
    return_dict=True, return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_load_returns_the_saved_model(mllm, mllm_folder, image):
    torch.testing.assert_close(
        logits(*load_mllm(mllm_folder), image), logits(*mllm, image), rtol=0, atol=0
    )


def test_any_hugging_face_tower_fits(language_model, tokenizer, image_processor, image):
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )  # fmt: skip
    )
    model, processor = build_llava(language_model, tokenizer, tower, image_processor)
    assert model.config.image_seq_length == 16
    assert logits(model, processor, image).isfinite().all()


def test_full_selection_keeps_the_class_token(
    language_model, tokenizer, clip, image_processor, image
):
    model, processor = build_llava(
        language_model,
        tokenizer,
        clip.to_vision_model(),
        image_processor,
        vision_feature_select_strategy="full",
    )
    assert model.config.image_seq_length == 17
    assert logits(model, processor, image).isfinite().all()


def test_connector_reads_the_last_layer_but_one(mllm, image):
    model, processor = mllm
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        expected = model.model.multi_modal_projector(states[-2][:, 1:])
        given = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(given[0], expected[0], rtol=0, atol=0)


def test_new_connector_depends_on_the_seed_alone(tokenizer, language_model, clip, image_processor):
    weights = []
    for global_seed, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(global_seed)
        model, _ = build_llava(
            language_model, tokenizer, clip.to_vision_model(), image_processor, seed=seed
        )
        weights.append(model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_replaced_tower_is_used(mllm, clip_folder, image):
    model, processor = mllm
    for parameter in model.model.vision_tower.parameters():
        parameter.data.zero_()
    blind = logits(model, processor, image)
    assert mllm_package.replace_vision_tower(model, clip_folder, processor) is model
    assert isinstance(model.model.vision_tower, CLIPMoEVisionModel)
    assert not torch.equal(logits(model, processor, image), blind)


def test_model_with_replaced_tower_survives_saving(mllm, clip_folder, tmp_path, image):
    model, processor = mllm
    replace_vision_tower(model, clip_folder, processor)
    save_mllm(model, processor, tmp_path / "new")
    again = load_mllm(tmp_path / "new")
    torch.testing.assert_close(
        logits(*again, image), logits(model, processor, image), rtol=0, atol=0
    )


def test_tower_of_another_width_is_refused(mllm, tmp_path):
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )  # fmt: skip
    )
    tower.save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="48 wide.*takes 32"):
        replace_vision_tower(mllm[0], tmp_path / "wide")


def test_missing_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_mllm(tmp_path / "absent")


def test_folder_without_config_is_told(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        load_mllm(tmp_path)


def test_clip_folder_is_not_an_mllm(clip_folder):
    with pytest.raises(InputError, match="type 'clip_moe', not an MLLM"):
        load_mllm(clip_folder)


def test_damaged_config_is_told(mllm_folder):
    (mllm_folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json' is damaged"):
        load_mllm(mllm_folder)


def test_truncated_weights_are_told(mllm_folder):
    weights = mllm_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_mllm(mllm_folder)


def test_missing_weight_is_named(mllm_folder):
    from safetensors.torch import load_file, save_file

    file = mllm_folder / "model.safetensors"
    weights = load_file(file)
    dropped = next(name for name in weights if "projector.linear_1.weight" in name)
    save_file({k: v for k, v in weights.items() if k != dropped}, file, {"format": "pt"})
    with pytest.raises(InputError, match="linear_1.weight"):
        load_mllm(mllm_folder)


def test_failed_save_leaves_the_old_checkpoint(mllm, mllm_folder, monkeypatch):
    model, processor = mllm

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processor, "save_pretrained", full_disk)
    before = (mllm_folder / "config.json").read_text()
    with pytest.raises(InputError, match="No space left"):
        save_mllm(model, processor, mllm_folder)
    assert (mllm_folder / "config.json").read_text() == before
    assert [p.name for p in mllm_folder.parent.iterdir()] == ["mllm"]


def test_saved_config_names_the_tower(mllm_folder):
    config = json.loads((mllm_folder / "config.json").read_text())
    assert config["vision_config"]["model_type"] == "clip_moe_vision"


def test_stated_number_of_image_tokens_is_corrected(mllm, image):
    model, processor = mllm
    expected = logits(model, processor, image)
    assert correct_token_count(model, processor) == (16, 16)
    model.config.image_seq_length, processor.num_additional_image_tokens = 15, 0
    assert correct_token_count(model, processor) == (15, 16)
    torch.testing.assert_close(logits(model, processor, image), expected, rtol=0, atol=0)
