"""An MLLM as a chat model of lmms-eval; imported by lmms-eval alone."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from mllm.generation import Answer, Answerer, Request
from mllm.model import load_mllm
from vision_moe import InputError, open_image, to_rgb

_MAX_NEW_TOKENS = 128
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MLLM(lmms):
    """Questions about one picture each, or about none, answered as ``mllm eval`` answers them.

    Args:
        pretrained: A checkpoint folder, or a name on the hub.
        batch_size: Questions at once.
        device: Such as ``cuda:0``; of several processes each takes its own GPU.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        max_batch_size: Of lmms-eval, which hands it to every model; not needed here.

    Raises:
        InputError: There is no such checkpoint, or an argument is not one of these.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 64,
        device: str | None = None,
        dtype: str = "float32",
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise InputError(f"dtype is '{dtype}', not one of {', '.join(_DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size is '{batch_size}', not a whole number from 1")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1 or device is None:
            device = str(self.accelerator.device)
        self.device = torch.device(device)
        self.batch_size = int(batch_size)
        self._model, self._processor = load_mllm(pretrained, _DTYPES[dtype], device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, in the order of the requests."""
        asked, settings = [], []
        pictures: dict[Hashable, Image.Image] = {}
        for request in requests:
            _, to_messages, options, doc_id, task, split = request.args
            messages = to_messages(self.task_dict[task][split][doc_id])
            asked.append(_request(messages, pictures))
            settings.append(_settings(options))
        return self._answer_all(asked, settings, pictures)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """As above, round by round; the task sees the answers so far and says when it is done."""
        return [self._rounds(request) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation, and whether it is what greedy decoding would begin with."""
        asked = []
        pictures: dict[Hashable, Image.Image] = {}
        for request in requests:
            if len(request.args) == 2:  # no document: the continuation alone
                context, continuation = request.args
                visuals: Iterable[Any] = ()
            else:
                context, continuation, to_visuals, doc_id, task, split = request.args
                document = self.task_dict[task][split][doc_id]
                if callable(continuation):
                    continuation = continuation(document)
                visuals = to_visuals(document) or ()
            content: list[dict[str, Any]] = [{"type": "image", "url": one} for one in visuals]
            content.append({"type": "text", "text": context})
            plain = _request([{"role": "user", "content": content}], pictures)
            asked.append(Request(plain.image_key, plain.question, (str(continuation),)))
        answers = self._answer(asked, pictures, _MAX_NEW_TOKENS)
        return [answers[one].log_likelihoods[0] for one in asked]

    def _rounds(self, request: Instance) -> list[str]:
        _, to_messages, options, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        settings = _settings(options)
        messages, info = to_messages(document), None
        answers: list[str] = []
        while True:
            pictures: dict[Hashable, Image.Image] = {}
            answers += self._answer_all([_request(messages, pictures)], [settings], pictures)
            step = to_messages(
                document, round_idx=len(answers), previous_output=list(answers),
                previous_round_info=info,
            )  # fmt: skip
            if not (isinstance(step, tuple) and len(step) == 4):
                return answers
            messages, is_done, _, info = step
            if is_done:
                return answers

    def _answer_all(
        self,
        asked: Sequence[Request],
        settings: Sequence[tuple[int, tuple[str, ...]]],
        pictures: dict[Hashable, Image.Image],
    ) -> list[str]:
        answers: dict[tuple[Request, int], Answer] = {}
        for limit in {limit for limit, _ in settings}:
            pairs = zip(asked, settings, strict=True)
            some = [one for one, (of_one, _) in pairs if of_one == limit]
            found = self._answer(some, pictures, limit)
            answers |= {(one, limit): answer for one, answer in found.items()}
        return [
            _cut(answers[one, limit].text, stops)
            for one, (limit, stops) in zip(asked, settings, strict=True)
        ]

    def _answer(
        self, asked: Sequence[Request], pictures: dict[Hashable, Image.Image], limit: int
    ) -> dict[Request, Answer]:
        answerer = Answerer(self._model, self._processor, limit, self.batch_size)
        answers: dict[Request, Answer] = {}
        with tqdm(
            total=len(set(asked)), desc="answers", unit="q", disable=self.rank != 0
        ) as bar:
            for request, answer in answerer.answer(asked, pictures.__getitem__):
                if answer.fault is not None:
                    raise InputError(f"{request.question!r:.60}: {answer.fault}")
                answers[request] = answer
                bar.update()
        return answers


def _request(messages: Any, pictures: dict[Hashable, Image.Image]) -> Request:
    """The question of a user's one turn; its picture is kept by a hash, so that equals share."""
    turns = ChatMessages(messages=messages).messages
    if len(turns) != 1 or turns[0].role != "user":
        raise InputError("the model 'mllm' answers one user turn, and the task gives others")
    texts, images = [], []
    for part in turns[0].content:
        if part.type == "text":
            texts.append(part.text)
        elif part.type == "image":
            images.append(part.url)
        else:
            raise InputError(f"the model 'mllm' sees pictures, and the task shows {part.type}")
    if len(images) > 1:
        raise InputError(f"the model 'mllm' sees one picture, and a question shows {len(images)}")
    if not images:
        return Request(None, "\n".join(texts))
    picture = to_rgb(images[0]) if isinstance(images[0], Image.Image) else open_image(images[0])
    key = f"{picture.size} {hashlib.sha256(picture.tobytes()).hexdigest()}"
    pictures[key] = picture
    return Request(key, "\n".join(texts))


def _settings(options: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Longest answer, and texts that end it."""
    if (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1:
        raise InputError("the model 'mllm' decodes greedily; the task asks for sampling or beams")
    stops = options.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    return int(options.get("max_new_tokens") or _MAX_NEW_TOKENS), stops


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text
