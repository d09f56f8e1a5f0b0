"""A small language model that knows no language yet, in place of a pretrained one.

It learns the few hundred words of the questions together with the connector, within minutes on a
processor; what it answers is thus up to what the tower shows it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mllm.chat_template import CHAT_TEMPLATES
from mllm.easy_vqa import EasyVQA
from mllm.scenes import ScenesDataset, SceneWorld

_NUM_SCENES = 300
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_stand_in(folder: Path, seed: int) -> None:
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
