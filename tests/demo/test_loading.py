"""Whatever a checkpoint is stored as."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import vision_moe
from demo import DemoOptions
from demo.loading import load_chat_model, load_models
from mllm.chat import Sampling, Turn
from mllm.model import build_llava, load_mllm, save_mllm
from vision_moe import InputError

PICTURE = Image.linear_gradient("L").convert("RGB")


def said(chat):
    return "".join(chat.answer([Turn("is it red?", (PICTURE,))], Sampling(max_new_tokens=8)))


@pytest.fixture
def mllm_folder(tokenizer, clip, image_processor, tmp_path):
    """As wide as four bits need: their blocks are of 64 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    language_model = LlamaForCausalLM(config)
    tower = clip.to_vision_model()
    save_mllm(*build_llava(language_model, tokenizer, tower, image_processor), tmp_path / "mllm")
    return tmp_path / "mllm"


@pytest.fixture
def adapters(mllm_folder, tmp_path):
    model, _ = load_mllm(mllm_folder)
    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(0)
                parameter.normal_()
    adapted.base_model.config._name_or_path = str(mllm_folder)
    adapted.peft_config["default"].base_model_name_or_path = str(mllm_folder)
    adapted.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", adapted.merge_and_unload()


def test_adapters_are_merged_into_their_base(adapters):
    folder, expected = adapters
    chat = load_chat_model(str(folder), DemoOptions(str(folder)))
    found = dict(chat.model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter)


def test_base_option_wins(adapters, tmp_path):
    folder, _ = adapters
    options = DemoOptions(str(folder), base=str(tmp_path / "absent"))
    with pytest.raises(InputError, match="absent"):
        load_chat_model(str(folder), options)


def test_adapters_without_a_base_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2}))
    with pytest.raises(InputError, match="--base"):
        load_chat_model(str(tmp_path), DemoOptions(str(tmp_path)))


def test_pickled_adapters_are_not_read(adapters):
    folder, _ = adapters
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="pickles are not read"):
        load_chat_model(str(folder), DemoOptions(str(folder)))


@pytest.mark.parametrize(("load_in", "layer"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_language_model_of_few_bits_answers_on_the_cpu(mllm_folder, load_in, layer):
    options = DemoOptions(str(mllm_folder), load_in=load_in, device="cpu")
    chat = load_chat_model(str(mllm_folder), options)
    kinds = {type(module).__name__ for module in chat.model.model.language_model.modules()}
    tower = {type(module).__name__ for module in chat.model.model.vision_tower.modules()}
    assert layer in kinds and layer not in tower
    assert isinstance(said(chat), str)


def test_adapters_stand_beside_weights_of_few_bits(adapters):
    folder, _ = adapters
    chat = load_chat_model(str(folder), DemoOptions(str(folder), load_in="4bit", device="cpu"))
    assert any("lora_A" in name for name, _ in chat.model.named_parameters())
    assert isinstance(said(chat), str)


def test_clips_are_found_beside_the_checkpoint(mllm_folder, clip):
    vision_moe.save(clip, mllm_folder.parent / "clip_moe")
    assert list(load_models(DemoOptions(str(mllm_folder))).clips) == ["CLIP-MoE"]


def test_named_clip_is_missed(mllm_folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_models(DemoOptions(str(mllm_folder), dense_clip=tmp_path / "absent"))


def test_names_of_two_folders_differ(mllm_folder, tmp_path):
    models = load_models(DemoOptions(str(mllm_folder), compare=str(mllm_folder)))
    assert models.compare_name == f"{tmp_path.name}/mllm"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_device_is_told(mllm_folder):
    with pytest.raises(InputError, match="--device cuda"):
        load_chat_model(str(mllm_folder), DemoOptions(str(mllm_folder), device="cuda"))
