"""Greedy answers to many questions about pictures, computed as few times as possible.

Each distinct picture is encoded once, each distinct (picture, question) answered once, and what all
prompts share (the system message and the user's header) runs through the language model once.
Questions of similar length share a batch, padded on the left.

B batch, P tokens of the shared text, N image tokens, L padded length of the rest, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from mllm.prompts import ChatPrompts


@dataclass(frozen=True)
class Request:
    """One question about one picture; equal keys are the same picture."""

    image_key: Hashable
    question: str


@torch.inference_mode()
def generate_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    requests: Sequence[Request],
    open_image: Callable[[Hashable], Image.Image],
    max_new_tokens: int = 16,
    batch_size: int = 64,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[str]:
    """Answer every request by greedy decoding.

    Args:
        model: Any LLaVA model.
        processor: Its processor.
        requests: Questions, in any order.
        open_image: Gives the RGB picture of a key.
        max_new_tokens: Longest answer.
        batch_size: Questions at once.
        autocast_dtype: Lower precision for speed; fp32 keeps greedy answers stable.
        progress: Show a bar with the time left on stderr.

    Returns:
        The answers' texts, in the order of the requests.
    """
    if not requests:
        return []
    autocast: AbstractContextManager[object] = nullcontext()
    if autocast_dtype is not None:
        autocast = torch.autocast(model.device.type, autocast_dtype)
    model.eval()
    prompts = ChatPrompts(processor, model.config.image_seq_length)
    with autocast:
        keys = list(dict.fromkeys(request.image_key for request in requests))
        features = encode_images(model, processor, keys, open_image, batch_size, progress)
        shared_ids = prompts.prefix_ids[: prompts.prefix_ids.index(prompts.image_token_id)]
        decoder = _GreedyDecoder(model, shared_ids, prompts.end_of_turn_ids, max_new_tokens)
        distinct = {request: prompts.question_ids(request.question) for request in requests}
        # Longest first: what does not fit into memory shows at once.
        order = sorted(distinct, key=lambda request: -len(distinct[request]))
        answers: dict[Request, str] = {}
        with tqdm(total=len(order), desc="answers", unit="q", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                token_ids = decoder.answer(
                    torch.stack([features[request.image_key] for request in batch]),
                    [distinct[request] for request in batch],
                )
                texts = processor.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
                answers.update(zip(batch, (text.strip() for text in texts), strict=True))
                bar.update(len(batch))
    return [answers[request] for request in requests]


@torch.inference_mode()
def encode_images(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    keys: Sequence[Hashable],
    open_image: Callable[[Hashable], Image.Image],
    batch_size: int = 64,
    progress: bool = True,
) -> dict[Hashable, Tensor]:
    """Connector outputs ``(N, D)`` of each picture, ready to stand among token embeddings."""
    weight = model.get_input_embeddings().weight
    features: dict[Hashable, Tensor] = {}
    with tqdm(total=len(keys), desc="pictures", unit="img", disable=not progress) as bar:
        for start in range(0, len(keys), batch_size):
            batch = list(keys[start : start + batch_size])
            images = [open_image(key) for key in batch]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            output = model.get_image_features(
                pixel_values=pixels.to(weight.device, weight.dtype), return_dict=True
            )
            features.update(zip(batch, output.pooler_output, strict=True))
            bar.update(len(batch))
    return features


class _GreedyDecoder:
    """Greedy decoding behind a text that all prompts share."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        shared_ids: list[int],
        end_ids: list[int],
        max_new_tokens: int,
    ) -> None:
        self._language_model = model.model.language_model
        self._head = model.lm_head
        self._embed = model.get_input_embeddings()
        self._device = model.device
        self._end_ids = torch.tensor(end_ids, device=self._device)
        self._max_new_tokens = max_new_tokens
        self._num_shared = len(shared_ids)
        self._shared = DynamicCache()
        if shared_ids:
            ids = torch.tensor([shared_ids], device=self._device)  # (1, P)
            self._language_model(
                inputs_embeds=self._embed(ids), past_key_values=self._shared, use_cache=True
            )

    def answer(self, features: Tensor, questions: list[list[int]]) -> list[list[int]]:
        """Continue each ``shared text + picture + question``.

        Args:
            features: ``(B, N, D)`` pictures.
            questions: B lists of token ids.

        Returns:
            B lists of new token ids, without the end of turn.
        """
        embeds, mask = self._pad_left(features, questions)  # (B, L, D), (B, P+L)
        cache = copy.deepcopy(self._shared)
        if self._num_shared:
            cache.batch_repeat_interleave(len(questions))
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, self._num_shared :]
        answers: list[list[int]] = [[] for _ in questions]
        running = torch.ones(len(questions), dtype=torch.bool, device=self._device)
        for _ in range(self._max_new_tokens):
            hidden = self._language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            token = self._head(hidden[:, -1]).argmax(-1)  # (B,)
            running &= ~torch.isin(token, self._end_ids)
            if not running.any():
                break
            for row, (goes_on, new) in enumerate(
                zip(running.tolist(), token.tolist(), strict=True)
            ):
                if goes_on:
                    answers[row].append(new)
            embeds = self._embed(token).unsqueeze(1)  # (B, 1, D)
            mask = torch.cat([mask, mask.new_ones(len(questions), 1)], 1)
            positions = positions[:, -1:] + 1
        return answers

    def _pad_left(self, features: Tensor, questions: list[list[int]]) -> tuple[Tensor, Tensor]:
        batch, num_image_tokens, width = features.shape
        longest = max(map(len, questions))
        embeds = features.new_zeros(batch, num_image_tokens + longest, width)
        mask = torch.ones(
            batch, self._num_shared + num_image_tokens + longest, dtype=torch.long,
            device=self._device,
        )  # fmt: skip
        for row, question in enumerate(questions):
            padding = longest - len(question)
            ids = torch.tensor(question, device=self._device)
            embeds[row, padding:] = torch.cat([features[row], self._embed(ids)])
            mask[row, self._num_shared : self._num_shared + padding] = 0
        return embeds, mask
