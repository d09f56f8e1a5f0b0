"""A conversation as the server keeps it, and as the page shows it.

The page is only shown the conversation: what a browser sends back of it is never read again.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from demo.pictures import open_upload
from mllm.chat import ChatModel, Sampling, Turn

# Text is sent to the page at most this often.
_SECONDS_BETWEEN_UPDATES = 0.05
# Code is shown as it is; a code span in which something is escaped would show the escapes.
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


@dataclass(frozen=True)
class Exchange:
    """A question, the files of its pictures on the server, the answer as far as it is known."""

    question: str
    pictures: tuple[str, ...] = ()
    answer: str = ""
    attempt: int = 0
    speed: Speed | None = None


@dataclass(frozen=True)
class Speed:
    """How fast an answer came."""

    first_token_seconds: float
    seconds: float
    num_tokens: int

    def __str__(self) -> str:
        rest = self.seconds - self.first_token_seconds
        rate = f", then {(self.num_tokens - 1) / rest:.1f} tokens/s" if self.num_tokens > 1 else ""
        return f"first token after {self.first_token_seconds:.2f} s{rate}"


Conversation = tuple[Exchange, ...]


def answer(
    model: ChatModel, conversation: Conversation, sampling: Sampling, max_pixels: int
) -> Iterator[Conversation]:
    """The conversation with its last answer growing.

    Raises:
        InputError: A picture, the question or the whole length does not do.
    """
    *before, last = conversation
    sampling = replace(sampling, seed=sampling.seed + last.attempt)
    started = time.perf_counter()
    turns = [_turn(exchange, max_pixels) for exchange in conversation]
    stream = model.answer(turns, sampling)
    last = replace(last, answer="", speed=None)
    first_token_seconds, shown, num_pieces = 0.0, 0.0, 0
    for text in stream:
        now = time.perf_counter()
        if not last.answer:
            first_token_seconds = now - started
        num_pieces += 1
        last = replace(last, answer=last.answer + text)
        if now - shown > _SECONDS_BETWEEN_UPDATES:
            shown = now
            yield (*before, last)
    num_tokens = max(num_pieces, len(model.processor.tokenizer.tokenize(last.answer)))
    if num_pieces:
        seconds = time.perf_counter() - started
        last = replace(last, speed=Speed(first_token_seconds, seconds, num_tokens))
    yield (*before, last)


def _turn(exchange: Exchange, max_pixels: int) -> Turn:
    images = tuple(open_upload(path, max_pixels).image for path in exchange.pictures)
    return Turn(exchange.question, images, exchange.answer)


def messages(conversation: Conversation, pending: bool = False) -> list[dict[str, Any]]:
    """What Gradio's chatbot shows; a message for each picture, question and answer.

    Args:
        conversation: What was said.
        pending: The last answer is still to come.
    """
    shown: list[dict[str, Any]] = []
    for exchange in conversation:
        shown += [{"role": "user", "content": {"path": path}} for path in exchange.pictures]
        shown.append({"role": "user", "content": as_text(exchange.question)})
        text = as_markdown(exchange.answer)
        is_last = exchange is conversation[-1]
        if text or not (is_last and pending):
            shown.append({"role": "assistant", "content": text or "*(no answer)*"})
    return shown


def exchange_of_message(conversation: Conversation, index: int | Sequence[int]) -> int:
    """Number of the exchange that the message with this number belongs to."""
    wanted = index if isinstance(index, int) else index[0]
    start = 0
    for number, exchange in enumerate(conversation):
        start += len(exchange.pictures) + 2
        if wanted < start:
            return number
    return len(conversation) - 1


def as_text(typed: str) -> str:
    """Markdown that shows what was typed, tags and special tokens included."""
    return html.escape(typed, quote=False)


def from_text(shown: str) -> str:
    """What :func:`as_text` was given."""
    return html.unescape(shown)


def as_markdown(answer: str) -> str:
    """An answer's Markdown, in which no tag and no picture is anything but text.

    The page cleans what it renders, and its content policy fetches nothing from elsewhere; this
    also lets readers see what the model wrote.
    """
    pieces = _CODE.split(answer)
    pieces[::2] = [html.escape(text, quote=False).replace("![", "!\\[") for text in pieces[::2]]
    return "".join(pieces)


def last_picture(conversation: Conversation) -> str | None:
    """The file of the picture that was shown last."""
    pictures = [path for exchange in conversation for path in exchange.pictures]
    return pictures[-1] if pictures else None
