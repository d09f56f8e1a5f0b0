"""Talking about pictures: an answer at a time, streamed, sampled or greedy, with follow-ups.

The model decodes while the answer is read, in the reader's thread: an answer that nobody reads any
further is not computed any further.

L tokens of a prompt, N image tokens, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    DynamicCache,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mllm.decoding import cache_argument
from mllm.generation import encode_images
from mllm.prompts import ChatPrompts, Question, clean_text
from mllm.tiles import num_image_tokens
from vision_moe import InputError

# Pictures whose connector outputs are kept: a follow-up does not encode its picture again.
_NUM_KEPT_IMAGES = 32


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        temperature: 0 takes the likeliest token always.
        top_p: Smallest set of tokens with this probability in sum is drawn from.
        repetition_penalty: Above 1, tokens that the answer holds become less likely.
        max_new_tokens: Longest answer.
        seed: Of the draw; equal seeds give equal answers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0

    def warpers(self) -> Any:
        """What is done to the logits before the draw: ``(tokens so far, logits) -> logits``."""
        warpers = LogitsProcessorList()
        if self.repetition_penalty != 1:
            warpers.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature > 0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
            if self.top_p < 1:
                warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


@dataclass(frozen=True)
class Turn:
    """A question with the pictures that come with it, RGB, and its answer."""

    question: str
    images: tuple[Image.Image, ...] = ()
    answer: str = ""


class ChatModel:
    """Answers questions in conversations; it keeps no conversation itself.

    Args:
        model: The MLLM, a LLaVA model.
        processor: Its processor.
    """

    def __init__(self, model: Any, processor: LlavaProcessor) -> None:
        self.model = model
        self.processor = processor
        self.context_length: int = self.model.config.text_config.max_position_embeddings
        self._prompts = ChatPrompts(processor, model.config.image_seq_length)
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def answer(self, turns: Sequence[Turn], sampling: Sampling | None = None) -> Iterator[str]:
        """Stream the answer to the last turn's question, in pieces of text.

        Raises:
            InputError: The question is empty, or the conversation too long for the language model.
        """
        sampling = sampling or Sampling()
        if not clean_text(turns[-1].question):
            raise InputError("the question is empty")
        images = [image for turn in turns for image in turn.images]
        # A token is hardly ever longer than 16 characters: what cannot fit is not tokenised at all.
        if len(turns[-1].question) > 16 * self.context_length:
            raise InputError(
                f"the question has {len(turns[-1].question):,} characters, and the language model"
                f" holds {self.context_length:,} tokens"
            )
        ids = self._conversation_ids(turns)
        length = len(ids) + sum(
            num_image_tokens(self.model, self.processor, image) - 1 for image in images
        )
        if length + sampling.max_new_tokens > self.context_length:
            raise InputError(
                f"the conversation has {length} tokens, and the language model holds"
                f" {self.context_length} with an answer of up to {sampling.max_new_tokens}"
            )
        return self._stream(ids, images, sampling)

    def forget_images(self) -> None:
        """Encode every picture anew from now on."""
        self._features.clear()

    def _conversation_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids up to the header of the last answer, one placeholder for each picture."""
        prompts = self._prompts
        first, *others = turns
        ids = prompts.opening_ids(len(first.images))
        ids = ids + prompts.question_ids(first.question, after_image=bool(first.images))
        for before, turn in zip(turns, others, strict=False):
            ids += prompts.answer_ids(before.answer)
            ids += prompts.follow_up_ids(_with_pictures(turn.question, len(turn.images)))
        return ids

    def _stream(
        self, ids: list[int], images: list[Image.Image], sampling: Sampling
    ) -> Iterator[str]:
        tokens = self._tokens(ids, images, sampling)
        started = False
        for text in _texts(self.processor.tokenizer, tokens):
            text = text if started else text.lstrip()
            if text:
                started = True
                yield text

    def _tokens(
        self, ids: list[int], images: list[Image.Image], sampling: Sampling
    ) -> Iterator[int]:
        warpers = sampling.warpers()
        generator = torch.Generator().manual_seed(sampling.seed)
        cache = {cache_argument(self.model): DynamicCache()}
        answer: list[int] = []
        with torch.inference_mode():
            embeds = self._embed(ids, images)  # (1, L, D)
        for _ in range(sampling.max_new_tokens):
            # Entered anew for each token: the mode is the thread's, and the reader's meanwhile.
            with torch.inference_mode():
                logits = self.model(
                    inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **cache
                ).logits[:, -1]  # (1, V)
                seen = torch.tensor([answer], dtype=torch.long, device=logits.device)
                logits = warpers(seen, logits.float())
                if sampling.temperature > 0:
                    # On the CPU, so that a seed gives the same draw on every device.
                    token = int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator))
                else:
                    token = int(logits.argmax(-1))
                if token in self._prompts.end_of_turn_ids:
                    return
                answer.append(token)
                embeds = self._embed([token], [])
            yield token

    def _embed(self, ids: list[int], images: list[Image.Image]) -> Tensor:
        """``(1, L, D)``: token embeddings, each picture's features in the place of its token."""
        table = self.model.get_input_embeddings()
        pieces: list[Tensor] = []
        pictures = iter(images)
        run: list[int] = []
        for token in [*ids, None]:
            if token is not None and token != self._prompts.image_token_id:
                run.append(token)
                continue
            if run:
                pieces.append(table(torch.tensor(run, device=self.model.device)))
                run = []
            if token is not None:
                pieces.append(self._image_features(next(pictures)).to(pieces[-1].dtype))
        return torch.cat(pieces).unsqueeze(0)

    def _image_features(self, image: Image.Image) -> Tensor:
        """``(N, D)``."""
        content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if content not in self._features:
            self._features[content] = encode_images(
                self.model, self.processor, [None], lambda _: image, progress=False
            )[None]
        self._features.move_to_end(content)
        while len(self._features) > _NUM_KEPT_IMAGES:
            self._features.popitem(last=False)
        return self._features[content]


def _with_pictures(question: str, num_images: int) -> Question:
    """A later question, its pictures first, as the first question has them."""
    if num_images == 0:
        return question
    return ["", *["\n"] * (num_images - 1), "\n" + clean_text(question)]


def _texts(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it grows; a character of several tokens appears when it is whole."""
    ids: list[int] = []
    start = read = 0  # decoded together, so that a token knows the one before it
    shown = ""
    for token in tokens:
        ids.append(token)
        text = _decode(tokenizer, ids[start:])
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            start, read = read, len(ids)
            shown = _decode(tokenizer, ids[start:])
    rest = _decode(tokenizer, ids[start:])[len(shown) :]
    if rest:
        yield rest


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class ChatSession:
    """A conversation that begins with one picture.

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
        self._chat = ChatModel(model, processor)
        self._image = image
        self._sampling = Sampling(max_new_tokens=max_new_tokens)
        self._turns: list[Turn] = []

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer; question and answer then belong to the conversation.

        Raises:
            InputError: The question is empty, or too long for the language model.
        """
        turn = Turn(question, () if self._turns else (self._image,))
        answer = ""
        for text in self._chat.answer([*self._turns, turn], self._sampling):
            answer += text
            yield text
        self._turns.append(replace(turn, answer=answer))


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
