"""A small language model in place of a pretrained one.

It starts from random weights and learns, from text alone, to answer questions about a scene's
caption, then about pictures, through a tower that is no cell's, in minutes on a processor: it can
then look up in words whatever a connector says, and knows where in a row of patches to look.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mllm.chat_template import CHAT_TEMPLATES
from mllm.easy_vqa import EasyVQA
from mllm.model import load_mllm
from mllm.scenes import ScenesDataset, SceneWorld

_NUM_SCENES, _TEXT_SEED = 300, 3
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_questions(path: Path, num_scenes: int) -> None:
    """Conversations without a picture: its caption, then every question about it (JSONL)."""
    scenes = ScenesDataset(SceneWorld(), "train", num_scenes, _TEXT_SEED)
    numbers = tqdm(range(num_scenes), desc="writing questions", unit="scene", delay=2)
    with path.open("w", encoding="utf-8") as lines:
        for index in numbers:
            scene = scenes[index]
            turns: list[dict[str, str]] = []
            for question in scene.questions:
                asked = question.text if turns else f"{scene.detailed_caption}\n{question.text}"
                turns.append({"from": "human", "value": asked})
                turns.append({"from": "gpt", "value": question.answer})
            lines.write(json.dumps({"conversations": turns}) + "\n")


def take_language_model(mllm: Path, folder: Path) -> None:
    """Write the language model of an MLLM, and the tokenizer, as a folder of its own."""
    model, processor = load_mllm(mllm)
    config = model.config.text_config
    assert isinstance(config, LlamaConfig), "this module's own kind"
    alone = LlamaForCausalLM(config)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def make_untrained(folder: Path, seed: int) -> None:
    """Write the model, random weights, and its tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(
            vocab_size=768,
            special_tokens=list(_SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    padding, start, end = _SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=start,
        eos_token=end,
        pad_token=padding,
        chat_template=CHAT_TEMPLATES["chatml"].text,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _texts() -> list[str]:
    scenes = ScenesDataset(SceneWorld(), "train", _NUM_SCENES)
    texts = [question.text for question in EasyVQA("train", None).questions[:2000]]
    for index in range(len(scenes)):
        texts += [scenes[index].detailed_caption]
        texts += [f"{one.text} {one.answer}" for one in scenes[index].questions]
    return texts
