"""A tiny MLLM with real classes: byte-level BPE tokenizer, two-layer Llama, four-expert tower."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import vision_moe
from mllm.model import build_llava

# The template of SmolLM2-Instruct.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "what is the color of the circle? system user assistant You are a helpful AI assistant",
    "how many red triangles are there? is there a blue rectangle to the left of the square?",
    "yes no one two three four red green blue circle triangle upper left lower right",
]


@pytest.fixture(scope="session")
def _tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def tokenizer(_tokenizer):
    return copy.deepcopy(_tokenizer)


@pytest.fixture
def language_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,  # large enough that greedy answers depend on the prompt
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def _clip():
    torch.manual_seed(0)
    config = vision_moe.CLIPMoEConfig(
        open_clip_config={
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8,
            },
            "text_cfg": {
                "context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
            },
        },
        moe={"num_experts": 4, "top_k": 2, "vision_layers": [0, 1, 2], "text_layers": [0, 1]},
    )  # fmt: skip
    return vision_moe.CLIPMoEModel(config).eval()


@pytest.fixture
def clip(_clip):
    return copy.deepcopy(_clip)


@pytest.fixture(scope="session")
def clip_folder(_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "clip_moe"
    vision_moe.save(_clip, folder)
    return folder


@pytest.fixture
def image_processor():
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def mllm(language_model, tokenizer, clip, image_processor):
    """``(model, processor)``: 16 image tokens."""
    return build_llava(language_model, tokenizer, clip.to_vision_model(), image_processor)


@pytest.fixture
def mllm_folder(mllm, tmp_path):
    from mllm.model import save_mllm

    folder = tmp_path / "mllm"
    save_mllm(*mllm, folder)
    return folder
