"""Every test runs offline, on few threads and with a cache folder of its own; tiny real models.

The tiny MLLM: byte-level BPE tokenizer, two-layer Llama, four-expert tower, 16 image tokens.
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them: transformers decides on import whether it is offline.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import vision_moe  # noqa: E402
from mllm.model import build_llava, save_mllm  # noqa: E402

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


@pytest.fixture(scope="session", autouse=True)
def mllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``$MLLM_CACHE`` for the session: the user's own cache is neither read nor written."""
    folder = tmp_path_factory.mktemp("mllm-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def _tokenizer() -> PreTrainedTokenizerFast:
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
def tokenizer(_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(_tokenizer)


def language_model_of(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
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


@pytest.fixture
def language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return language_model_of(tokenizer)


@pytest.fixture(scope="session")
def _clip() -> vision_moe.CLIPMoEModel:
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
def clip(_clip: vision_moe.CLIPMoEModel) -> vision_moe.CLIPMoEModel:
    return copy.deepcopy(_clip)


@pytest.fixture(scope="session")
def clip_folder(
    _clip: vision_moe.CLIPMoEModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "clip_moe"
    vision_moe.save(_clip, folder)
    return folder


@pytest.fixture
def image_processor() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def mllm(
    language_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    clip: vision_moe.CLIPMoEModel,
    image_processor: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return build_llava(language_model, tokenizer, clip.to_vision_model(), image_processor)


@pytest.fixture
def mllm_folder(
    mllm: tuple[LlavaForConditionalGeneration, LlavaProcessor], tmp_path: Path
) -> Path:
    save_mllm(*mllm, tmp_path / "mllm")
    return tmp_path / "mllm"


@pytest.fixture(scope="session")
def llm_folder(
    _tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny language model as a folder."""
    folder = tmp_path_factory.mktemp("llm")
    _tokenizer.save_pretrained(folder)
    language_model_of(_tokenizer).save_pretrained(folder)
    return folder
