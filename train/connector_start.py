"""The connector's closed-form start: patch features -> embeddings of the picture's words.

Every patch of a picture is regressed on the mean input embedding of the words that are said of it,
rare words first: what is said of every picture tells nothing about any.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from mllm.connector import ridge_start
from train.instruction_data import InstructionSample

_MAX_PATCHES = 32_768


def start_connector(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[InstructionSample],
    features: np.ndarray,
    seed: int,
) -> float:
    """Set the connector's weights from the samples' answers, without a gradient step.

    Args:
        model: Its connector is changed in place.
        tokenizer: Of its language model.
        samples: Pictures and what is said of them.
        features: ``(n, N, V)`` by ``image_key``.
        seed: Of the random features, and of the pictures that are used where there are many.

    Returns:
        The share of the targets' variance that the patches explain.
    """
    words_of: dict[int, set[str]] = {}
    for sample in samples:
        text = " ".join(answer for _, answer in sample.turns).lower()
        words_of.setdefault(sample.image_key, set()).update(re.findall(r"\w+", text))
    keys = np.array(sorted(words_of))
    num_tokens = features.shape[1]
    if len(keys) * num_tokens > _MAX_PATCHES:
        keys = np.random.default_rng(seed).permutation(keys)[: max(1, _MAX_PATCHES // num_tokens)]
    table = model.model.language_model.embed_tokens.weight.detach().float()
    targets = _word_targets([words_of[int(key)] for key in keys], tokenizer, table)
    patches = torch.from_numpy(np.stack([features[key] for key in keys])).float()
    spread = float((table - table.mean(0)).square().mean().sqrt())
    return ridge_start(
        model.model.multi_modal_projector,
        patches.flatten(0, 1).to(table.device),
        targets.repeat_interleave(num_tokens, dim=0),
        seed=seed,
        output_rms=spread,
    )


def _word_targets(
    words_of: Sequence[set[str]], tokenizer: PreTrainedTokenizerBase, table: Tensor
) -> Tensor:
    """``(n, D)``: mean embedding of each picture's words, weighted by inverse frequency."""
    frequency = Counter(word for words in words_of for word in words)
    embedding = {}
    for word in frequency:
        ids = tokenizer.encode(f" {word}", add_special_tokens=False)
        embedding[word] = table[torch.tensor(ids, device=table.device)].mean(0)
    targets = []
    for words in words_of:
        # +1: also a word that is said of every picture has some weight, so none has no target.
        weights = {word: math.log(len(words_of) / frequency[word]) + 1 for word in sorted(words)}
        if not weights:
            targets.append(table.mean(0))
            continue
        total = torch.stack([weights[word] * embedding[word] for word in weights]).sum(0)
        targets.append(total / sum(weights.values()))
    return torch.stack(targets)
