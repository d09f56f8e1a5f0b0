"""The connector's start: image tokens -> input embeddings of the picture's words.

A language model can look up in its context what stands there as words. So before it takes part at
all, the connector learns to say each picture's words in its own embeddings: in closed form, then by
regression. Where a token stands for several words, it stands for none of them clearly; the CLS
token and the patches therefore divide the words between them.

n pictures, N image tokens, V tower width, D width of the language model, W words.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.connector import regress, ridge_start, solve_ridge
from train.instruction_rows import InstructionSample
from vision_moe import InputError

_MAX_TOKENS = 131_072
_MAX_WORDS = 512
_RIDGE = 3e-2


def start_connector(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[InstructionSample],
    features: Callable[[list[int]], np.ndarray],
    seed: int,
) -> float:
    """Set the connector's weights from the samples' answers; the language model is not run.

    Args:
        model: Its connector is changed in place.
        tokenizer: Of its language model.
        samples: Pictures and what is said of them.
        features: Reads ``(n, N, V)`` of n ``image_keys``.
        seed: Of the random features, the order of the regression, and the pictures that are used
            where there are many.

    Returns:
        The share of the targets' variance that the connector explains.
    """
    if not isinstance(model.model.multi_modal_projector, LlavaMultiModalProjector):
        raise InputError("'connector_start: words' is for the connector mlp2x_gelu alone")
    words_by_key: dict[int, set[str]] = {}
    for sample in samples:
        text = " ".join(answer for _, answer in sample.turns).lower()
        for key in sample.image_keys:
            words_by_key.setdefault(key, set()).update(re.findall(r"\w+", text))
    keys = np.array(sorted(words_by_key))
    num_tokens = features([int(keys[0])]).shape[1]
    if len(keys) * num_tokens > _MAX_TOKENS:
        keys = np.random.default_rng(seed).permutation(keys)[: max(1, _MAX_TOKENS // num_tokens)]
    words_of = [words_by_key[int(key)] for key in keys]
    tokens = torch.from_numpy(features(keys.tolist())).float()  # (n, N, V)
    table = model.model.language_model.embed_tokens.weight.detach().float().cpu()
    if model.config.vision_feature_select_strategy == "full" and num_tokens > 1:
        of_cls = words_of_cls(tokens, words_of)
        parts = [(tokens[:, :1], of_cls), (tokens[:, 1:], set().union(*words_of) - of_cls)]
    else:
        parts = [(tokens, set().union(*words_of))]
    inputs, targets = [], []
    for part, vocabulary in parts:
        said = [words & vocabulary for words in words_of]
        known = torch.tensor([bool(words) for words in said])
        if known.any():
            embedded = _word_targets([words for words in said if words], tokenizer, table)
            inputs.append(part[known].flatten(0, 1))
            targets.append(embedded.repeat_interleave(part.shape[1], dim=0))
    projector = model.model.multi_modal_projector
    everything = torch.cat(inputs), torch.cat(targets)
    ridge_start(projector, *everything, ridge=_RIDGE, seed=seed)
    return regress(projector, *everything, seed=seed)


def words_of_cls(tokens: Tensor, words_of: Sequence[set[str]]) -> set[str]:
    """The words that the CLS token should say, and not the patches.

    Words that are said together are kept apart (a cut of the graph of co-occurrences), so that
    words that exclude each other, as colors do, end up on one side. The CLS token takes the side
    that single patches know less of, on pictures that this was not fitted to.

    Args:
        tokens: ``(n, N, V)``, CLS first.
        words_of: The words of each picture.
    """
    frequency = Counter(word for words in words_of for word in sorted(words))
    # A word of every picture, or of one alone, tells nothing.
    words = [word for word, n in frequency.most_common(_MAX_WORDS) if 1 < n < len(words_of)]
    if not words:
        return set()
    said = torch.tensor([[float(word in of) for word in words] for of in words_of])  # (n, W)
    is_first = _cut(said.T @ said)
    known = _explained(tokens[:, 1:], said)
    first = torch.tensor(is_first)
    if first.all():
        return set()
    of_cls = first if known[first].mean() < known[~first].mean() else ~first
    return {word for word, chosen in zip(words, of_cls.tolist(), strict=True) if chosen}


def _cut(weights: Tensor) -> list[bool]:
    """Which of two sides each node is on, so that much weight crosses: greedy, then local moves.

    Args:
        weights: ``(W, W)``, symmetric; the diagonal is ignored.
    """
    weights = weights.clone().fill_diagonal_(0)
    sides = torch.zeros(len(weights))  # 1 and -1; 0 where not yet placed
    for _ in range(10):
        before = sides.clone()
        for node in range(len(weights)):
            sides[node] = -1.0 if weights[node] @ sides > 0 else 1.0
        if torch.equal(sides, before):
            break
    return [side > 0 for side in sides.tolist()]


def _explained(tokens: Tensor, said: Tensor) -> Tensor:
    """``(W,)``: share of each word's variance that one token predicts, on every other picture."""
    repeated = said[:, None].expand(-1, tokens.shape[1], -1)
    weight, bias, _ = solve_ridge(tokens[::2].flatten(0, 1), repeated[::2].flatten(0, 1), _RIDGE)
    predicted = tokens[1::2].double() @ weight.T + bias
    error = (predicted - repeated[1::2]).square().mean((0, 1))
    return 1 - error / said[1::2].double().var(0, correction=0).clamp(min=1e-6)


def _word_targets(
    words_of: Sequence[set[str]], tokenizer: PreTrainedTokenizerBase, table: Tensor
) -> Tensor:
    """``(n, D)``: mean embedding of each picture's words, weighted by inverse frequency.

    A mean of several words is shorter than a word, and is made as long as one: that is what the
    language model expects.
    """
    frequency = Counter(word for words in words_of for word in words)
    centre = table.mean(0)
    length = (table - centre).square().sum(1).mean().sqrt()
    embedding = {}
    for word in frequency:
        ids = tokenizer.encode(f" {word}", add_special_tokens=False)
        embedding[word] = table[torch.tensor(ids)].mean(0) - centre
    targets = []
    for words in words_of:
        # +1: also a word that is said of every picture has some weight, so none has no target.
        weights = {word: math.log(len(words_of) / frequency[word]) + 1 for word in sorted(words)}
        total = torch.stack([weights[word] * embedding[word] for word in weights]).sum(0)
        targets.append(centre + total * (length / total.norm().clamp(min=1e-6)))
    return torch.stack(targets)
