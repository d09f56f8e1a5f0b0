"""Greedy answers to many questions about pictures, computed as few times as possible.

Each distinct picture is encoded once, each distinct (picture, question) answered once. What prompts
share runs through the language model once: the system message and the user's header for all, the
picture's tokens for the questions about it. Questions of similar length share a batch, padded on
the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm.decoding import Decoder, Prefixes
from mllm.products import QuickLinear
from mllm.prompts import ChatPrompts
from mllm.tiles import is_tiled
from vision_moe import InputError

# Questions that are sorted by length together, in batches.
_BATCHES_SORTED = 8
# Keys and values of pictures that are held at once, where a batch does not need more.
_PREFIX_BYTES = 1 << 30


@dataclass(frozen=True)
class Request:
    """One question about one picture; equal keys are the same picture.

    Attributes:
        image_key: ``None`` for a question without a picture.
        question: Its text.
        choices: Where there are any, the answer is the likeliest of them.
    """

    image_key: Hashable
    question: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """To one request.

    Attributes:
        text: Without the end of turn.
        finished: The model ended it by itself.
        fault: Why there is no answer, in words; ``None`` where there is one.
        log_likelihoods: Of each choice, and whether greedy decoding would begin with it.
    """

    text: str
    finished: bool = True
    fault: str | None = None
    log_likelihoods: tuple[tuple[float, bool], ...] = ()


OpenImage = Callable[[Hashable], Image.Image]


class Answerer:
    """Answers requests in the order that costs least.

    Args:
        model: Any LLaVA model.
        processor: Its processor.
        max_new_tokens: Longest answer.
        batch_size: Questions at once.
        autocast_dtype: Lower precision for speed; fp32 keeps greedy answers stable.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        max_new_tokens: int = 16,
        batch_size: int = 64,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        model.eval()
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._dtype = autocast_dtype
        self._prompts = ChatPrompts(processor, model.config.image_seq_length)
        self._decoder = Decoder(model, self._prompts.end_of_turn_ids, max_new_tokens)
        self._num_opening = len(self._prompts.prefix_ids)
        limit = getattr(model.config.text_config, "max_position_embeddings", math.inf)
        self._longest = limit - max_new_tokens

    @torch.inference_mode()
    def answer(
        self, requests: Sequence[Request], open_image: OpenImage
    ) -> Iterator[tuple[Request, Answer]]:
        """Answer every distinct request; pairs come as soon as they are known, in any order.

        A picture that cannot be read, or a question that is too long for the language model, is a
        fault of its own answers and of no other's.
        """
        by_image: dict[Hashable, list[Request]] = {}
        for request in dict.fromkeys(requests):
            by_image.setdefault(request.image_key, []).append(request)
        for keys in self._chunks(by_image):
            yield from self._answer_chunk(keys, by_image, open_image)

    def _chunks(self, by_image: dict[Hashable, list[Request]]) -> Iterator[list[Hashable]]:
        """Pictures whose questions are answered together."""
        config: Any = self._model.config.text_config
        num_heads = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or num_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        token_bytes = 2 * config.num_hidden_layers * heads * width * self._model.dtype.itemsize
        most_images = max(self._batch_size, _PREFIX_BYTES // (token_bytes * self._num_opening))
        if is_tiled(self._model):  # prefixes that share a batch have one length
            most_images = 1
        most_questions = _BATCHES_SORTED * self._batch_size
        chunk: list[Hashable] = []
        num_questions = 0
        for key, questions in by_image.items():
            full = num_questions + len(questions) > most_questions or len(chunk) == most_images
            if chunk and (full or key is None or chunk == [None]):
                yield chunk
                chunk, num_questions = [], 0
            chunk.append(key)
            num_questions += len(questions)
        if chunk:
            yield chunk

    def _answer_chunk(
        self,
        keys: list[Hashable],
        by_image: dict[Hashable, list[Request]],
        open_image: OpenImage,
    ) -> Iterator[tuple[Request, Answer]]:
        # Never around a yield: it must not hold for who reads the answers.
        with self._arithmetic():
            features, faults = self._encode(keys, open_image)
        shown = [key for key in keys if key not in faults]
        for key, fault in faults.items():
            for request in by_image[key]:
                yield request, Answer("", fault=fault)
        with_image = keys != [None]
        ids: dict[Request, list[int]] = {}
        for request in (request for key in shown for request in by_image[key]):
            question = self._prompts.question_ids(request.question, after_image=with_image)
            length = self._num_opening + len(question)
            if features is not None:
                length += features.shape[1] - self._model.config.image_seq_length
            if length > self._longest:
                fault = f"a prompt of {length} tokens is too long"
                yield request, Answer("", fault=fault)
            else:
                ids[request] = question
        if not ids:
            return
        with self._arithmetic():
            prefixes = self._prefixes(features)
        row_of = {key: row for row, key in enumerate(shown)}
        # Longest first: what does not fit into memory shows at once.
        order = sorted(ids, key=lambda request: (bool(request.choices), -len(ids[request])))
        num_open = sum(not request.choices for request in order)
        for some, answer_batch in (
            (order[:num_open], self._generate),
            (order[num_open:], self._choose),
        ):
            for start in range(0, len(some), self._batch_size):
                batch = some[start : start + self._batch_size]
                rows = [row_of[request.image_key] for request in batch]
                questions = [ids[request] for request in batch]
                with self._arithmetic():
                    answers = answer_batch(prefixes, rows, questions, batch)
                yield from zip(batch, answers, strict=True)

    def _encode(
        self, keys: list[Hashable], open_image: OpenImage
    ) -> tuple[Tensor | None, dict[Hashable, str]]:
        """``(number of pictures, N, D)`` of readable ones, and what is wrong with the others."""
        if keys == [None]:
            return None, {}
        images, faults = [], {}
        for key in keys:
            try:
                images.append(open_image(key))
            except InputError as error:
                faults[key] = str(error)
        parts = [
            image_features(self._model, self._processor, images[start : start + self._batch_size])
            for start in range(0, len(images), self._batch_size)
        ]
        encoded = [features for part in parts for features in part]
        return torch.stack(encoded) if encoded else None, faults

    def _prefixes(self, features: Tensor | None) -> Prefixes:
        """Keys and values of what stands before the questions, a row for each picture."""
        if features is None:
            return self._decoder.prefix(self._prompts.opening_ids(num_images=0))
        ids = self._prompts.prefix_ids
        shared = self._decoder.prefix(ids[: ids.index(self._prompts.image_token_id)])
        parts = features.split(self._batch_size)
        return Prefixes.join([self._decoder.extend(shared, part) for part in parts])

    def _generate(
        self,
        prefixes: Prefixes,
        rows: list[int],
        questions: list[list[int]],
        batch: list[Request],
    ) -> list[Answer]:
        decoded = self._decoder.generate(prefixes, rows, questions)
        texts = self._processor.tokenizer.batch_decode(
            [ids for ids, _ in decoded], skip_special_tokens=True
        )
        return [
            Answer(text.strip(), finished)
            for text, (_, finished) in zip(texts, decoded, strict=True)
        ]

    def _choose(
        self,
        prefixes: Prefixes,
        rows: list[int],
        questions: list[list[int]],
        batch: list[Request],
    ) -> list[Answer]:
        candidates = [
            [self._prompts.answer_ids(choice)[:-1] or self._prompts.end_of_turn_ids[:1]
             for choice in request.choices]
            for request in batch
        ]  # fmt: skip
        scored = self._decoder.log_likelihoods(prefixes, rows, questions, candidates)
        answers = []
        for request, scores in zip(batch, scored, strict=True):
            best = max(range(len(scores)), key=[value for value, _ in scores].__getitem__)
            answers.append(Answer(request.choices[best], log_likelihoods=tuple(scores)))
        return answers

    def _arithmetic(self) -> AbstractContextManager[object]:
        if self._dtype is None:
            return QuickLinear()
        return torch.autocast(self._model.device.type, self._dtype)


def generate_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    requests: Sequence[Request],
    open_image: OpenImage,
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

    Raises:
        InputError: A picture cannot be read, or a question is too long.
    """
    answerer = Answerer(model, processor, max_new_tokens, batch_size, autocast_dtype)
    answers: dict[Request, str] = {}
    with tqdm(total=len(set(requests)), desc="answers", unit="q", disable=not progress) as bar:
        for request, answer in answerer.answer(requests, open_image):
            if answer.fault is not None:
                raise InputError(answer.fault)
            answers[request] = answer.text
            bar.update()
    return [answers[request] for request in requests]


@torch.inference_mode()
def encode_images(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    keys: Sequence[Hashable],
    open_image: OpenImage,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[Hashable, Tensor]:
    """Connector outputs ``(N, D)`` of each picture, ready to stand among token embeddings."""
    features: dict[Hashable, Tensor] = {}
    with tqdm(total=len(keys), desc="pictures", unit="img", disable=not progress) as bar:
        for start in range(0, len(keys), batch_size):
            batch = list(keys[start : start + batch_size])
            encoded = image_features(model, processor, [open_image(key) for key in batch])
            features.update(zip(batch, encoded, strict=True))
            bar.update(len(batch))
    return features


def image_features(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: Sequence[Image.Image]
) -> list[Tensor]:
    """Connector outputs ``(N, D)`` of each picture."""
    weight = model.get_input_embeddings().weight
    shown = processor.image_processor(list(images), return_tensors="pt")
    pixels = shown.pop("pixel_values").to(weight.device, weight.dtype)
    # A model that is shown tiles also reads the pictures' sizes.
    output: Any = model.get_image_features(pixel_values=pixels, **shown, return_dict=True)
    return list(output.pooler_output)
