"""Talking about one picture: an answer at a time, streamed, with follow-up questions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from mllm.generation import encode_images
from mllm.prompts import ChatPrompts, clean_text
from vision_moe import InputError


class ChatSession:
    """A conversation about one picture; the picture is encoded once.

    Args:
        model: The MLLM.
        processor: Its processor.
        image: RGB.
        max_new_tokens: Longest answer.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        image: Image.Image,
        max_new_tokens: int = 128,
    ) -> None:
        self._model: Any = model
        self._tokenizer = processor.tokenizer
        self._max_new_tokens = max_new_tokens
        self._prompts = ChatPrompts(processor, model.config.image_seq_length)
        self._image_features = encode_images(
            model, processor, [None], lambda _: image, progress=False
        )[None]
        self._ids = list(self._prompts.prefix_ids)
        self._num_turns = 0

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer; question and answer then belong to the conversation.

        Raises:
            InputError: The question is empty, or too long for the language model.
        """
        if not clean_text(question):
            raise InputError("the question is empty")
        pieces = self._prompts.follow_up_ids if self._num_turns else self._prompts.question_ids
        ids = self._ids + pieces(question)
        limit = self._model.config.text_config.max_position_embeddings
        if len(ids) + self._max_new_tokens > limit:
            raise InputError(
                f"the conversation has {len(ids)} tokens, and the language model holds {limit}"
                f" with an answer of up to {self._max_new_tokens}"
            )
        answer = ""
        for text in self._stream(ids):
            answer += text
            yield text
        self._ids = ids + self._prompts.answer_ids(answer)
        self._num_turns += 1

    def _stream(self, ids: list[int]) -> Iterator[str]:
        streamer = TextIteratorStreamer(self._tokenizer, skip_special_tokens=True)
        stopped = threading.Event()
        errors: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    embeds = self._embed(ids)
                    self._model.generate(
                        inputs_embeds=embeds,
                        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long).to(
                            embeds.device
                        ),
                        max_new_tokens=self._max_new_tokens,
                        do_sample=False,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
                    )
            except BaseException as error:  # handed to the thread that reads
                errors.append(error)
                streamer.end()

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        try:
            started = False
            for text in streamer:
                text = text if started else text.lstrip()
                if text:
                    started = True
                    yield text
        finally:
            stopped.set()
            worker.join()
        if errors:
            raise errors[0]

    def _embed(self, ids: list[int]) -> Tensor:
        """``(1, L, D)``: token embeddings with the picture in its place."""
        table = self._model.get_input_embeddings()
        tokens = torch.tensor(ids, device=self._model.device)
        is_image = tokens == self._prompts.image_token_id
        embeds = table(tokens)  # (L, D)
        embeds[is_image] = self._image_features.to(embeds.dtype)
        return embeds.unsqueeze(0)


class _Stop(StoppingCriteria):
    """Stops generation when nobody reads any more."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stopped.is_set(), device=input_ids.device)


def run_chat(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image: Image.Image,
    question: str | None = None,
) -> None:
    """Answer one question on stdout, or hold a conversation in the terminal until it ends.

    Args:
        model: The MLLM.
        processor: Its processor.
        image: RGB.
        question: The only question; ``None`` for a conversation.
    """
    session = ChatSession(model, processor, image)
    if question is not None:
        print("".join(session.ask(question)).strip())
        return
    print("Ask about the picture; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not clean_text(line):
            return
        for text in session.ask(line):
            print(text, end="", flush=True)
        print()
