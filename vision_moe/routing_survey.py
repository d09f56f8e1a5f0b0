"""Which tokens a model's routers send where, counted over many pictures and texts.

Tokens are told apart by kind: of a picture its class token and its patches; of a text its words and
its end, from which the text's feature is taken.

B batch, L tokens, E experts, V values of a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_moe.diagnostics import (
    RoutingStatistics,
    mutual_information,
    routing_agreement,
    routing_statistics,
)
from vision_moe.modeling import CLIPMoEModel
from vision_moe.routing import record_routing

CLASS, PATCH, WORD, END = "class token", "patches", "words", "text end"

#: Factor -> the number of each sample's value, -1 where it has none.
Factors = Mapping[str, np.ndarray]


@dataclass
class TokenCounts:
    """Of one block and kind of token.

    Attributes:
        choices: ``(E,)``: how often each expert was among the chosen.
        entropy: Sum of the tokens' entropies, nats.
        num_tokens: How many were seen.
        by_factor: ``(V, E)`` for each factor: first choices by the sample's value.
        first: Each token's first choice, in the order seen.
    """

    choices: np.ndarray
    entropy: float = 0.0
    num_tokens: int = 0
    by_factor: dict[str, np.ndarray] = field(default_factory=dict)
    first: list[np.ndarray] = field(default_factory=list)

    def add(self, logits: Tensor, samples: np.ndarray, top_k: int, factors: Factors) -> None:
        """Count tokens: ``logits`` ``(T, E)``, ``samples`` ``(T,)`` which sample each is of."""
        num_experts = logits.shape[-1]
        chosen = logits.topk(top_k, dim=-1).indices.flatten()
        self.choices += torch.bincount(chosen, minlength=num_experts).cpu().numpy()
        log_probs = logits.float().log_softmax(-1)
        self.entropy += float(-(log_probs.exp() * log_probs).sum())
        self.num_tokens += len(logits)
        first = logits.argmax(-1).cpu().numpy()
        self.first.append(first.astype(np.int8 if num_experts < 128 else np.int32))
        for name, values in factors.items():
            counts = self.by_factor.setdefault(
                name, np.zeros((int(values.max(initial=0)) + 1, num_experts), np.int64)
            )
            value = values[samples]
            np.add.at(counts, (value[value >= 0], first[value >= 0]), 1)

    def statistics(self) -> RoutingStatistics:
        return routing_statistics(self.choices, self.entropy / max(self.num_tokens, 1))

    def information(self) -> dict[str, float]:
        """Bits that an expert's number tells of each factor."""
        return {name: mutual_information(counts) for name, counts in self.by_factor.items()}


#: Block -> kind of token -> counts; blocks by the name of their MoE layer, vision first.
Survey = dict[str, dict[str, TokenCounts]]


@torch.inference_mode()
def survey_routing(
    model: CLIPMoEModel,
    pictures: Sequence[Callable[[], Image.Image]],
    texts: Sequence[str],
    picture_factors: Factors,
    text_factors: Factors,
    batch_size: int = 64,
) -> Survey:
    """Count where the routers send the tokens of pictures and texts.

    Args:
        model: A mixture.
        pictures: Each opens one.
        texts: Any.
        picture_factors: Of the pictures.
        text_factors: Of the texts.
        batch_size: Pictures or texts at a time.
    """
    survey: Survey = {}
    num_prefix = num_prefix_tokens(model)
    for start in range(0, len(pictures), batch_size):
        numbers = np.arange(start, min(start + batch_size, len(pictures)))
        pixels = torch.stack([model.preprocess(pictures[i]()) for i in numbers.tolist()])
        with record_routing(model.visual) as record:
            model.encode_image(pixels.to(model.device))
        for name, routed in record.router_logits.items():
            logits = routed.flatten(1, -2)  # a convolution's rows and columns become tokens
            kinds = {PATCH: torch.arange(logits.shape[1]) >= num_prefix}
            if num_prefix:
                kinds[CLASS] = torch.arange(logits.shape[1]) == 0
            for kind, positions in kinds.items():
                mask = positions.expand(len(numbers), -1)
                _add(survey, f"visual.{name}", kind, logits, mask, numbers, record.top_k[name],
                     picture_factors)  # fmt: skip
    tokens = model.tokenizer(list(texts)) if texts else torch.empty(0, 0)
    pad_id = getattr(model.text, "pad_id", 0)
    for start in range(0, len(texts), batch_size):
        numbers = np.arange(start, min(start + batch_size, len(texts)))
        some = model.trim_tokens(tokens[start : start + batch_size])
        with record_routing(model.text) as record:
            model.encode_text(some.to(model.device))
        used = some.ne(pad_id)
        end = torch.arange(some.shape[1]) == used.sum(1, keepdim=True) - 1
        for name, logits in record.router_logits.items():
            for kind, mask in ((WORD, used & ~end), (END, end)):
                _add(survey, f"text.{name}", kind, logits, mask, numbers, record.top_k[name],
                     text_factors)  # fmt: skip
    return survey


def _add(
    survey: Survey,
    block: str,
    kind: str,
    logits: Tensor,
    mask: Tensor,
    numbers: np.ndarray,
    top_k: int,
    factors: Factors,
) -> None:
    counts = survey.setdefault(block, {}).setdefault(
        kind, TokenCounts(np.zeros(logits.shape[-1], np.int64))
    )
    rows = mask.nonzero()[:, 0].numpy()
    counts.add(logits.cpu()[mask], numbers[rows], top_k, factors)


def num_prefix_tokens(model: CLIPMoEModel) -> int:
    """Tokens of a picture before its patches: the class token, where there is one."""
    rows, columns = patch_grid(model)
    with record_routing(model.visual) as record, torch.inference_mode():
        height, width = _image_size(model)
        model.encode_image(torch.zeros(1, 3, height, width, device=model.device))
    lengths = {logits.shape[1] for logits in record.router_logits.values() if logits.ndim == 3}
    return max(min(lengths, default=0) - rows * columns, 0)


def patch_grid(model: CLIPMoEModel) -> tuple[int, int]:
    """Rows and columns of a picture's patches."""
    patch = model.config.vision_config.patch_size
    assert patch is not None
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
    height, width = _image_size(model)
    return height // sides[0], width // sides[1]


def _image_size(model: CLIPMoEModel) -> tuple[int, int]:
    size = model.config.vision_config.image_size
    assert size is not None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def survey_agreement(one: Survey, two: Survey) -> dict[str, float]:
    """For each block that both have, :func:`vision_moe.diagnostics.routing_agreement`."""
    agreement = {}
    for block in one.keys() & two.keys():
        first, second = (_first_choices(which[block]) for which in (one, two))
        num_experts = _num_experts(one[block])
        if len(first) == len(second) and num_experts == _num_experts(two[block]):
            agreement[block] = routing_agreement(first, second, num_experts)
    return {block: agreement[block] for block in one if block in agreement}


def _first_choices(kinds: Mapping[str, TokenCounts]) -> np.ndarray:
    return np.concatenate([part for kind in sorted(kinds) for part in kinds[kind].first])


def _num_experts(kinds: Mapping[str, TokenCounts]) -> int:
    return len(next(iter(kinds.values())).choices)
