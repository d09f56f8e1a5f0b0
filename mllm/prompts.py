"""Chat-template pieces: the opening with the pictures, a question's branch, an answer.

A rendered turn is cut at the picture and at the answer:

    <|im_start|>system ... <|im_start|>user\\n <image> x N | \\n question <|im_end|> ... assistant\\n | answer <|im_end|>
    prefix                                               | question                             | answer

The prefix is the same for every question about a picture, so training and generation compute it
once. Token ids of the pieces, laid end to end, are those of the rendered conversation: a special
token stands at each cut, and text never merges with one. Labels come from the pieces too, so that
nothing has to be counted again.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from mllm.chat_template import IMAGE_TOKEN
from vision_moe import InputError

# A question with pictures is a sequence of texts, a picture between each two.
Question: TypeAlias = str | Sequence[str]

# Stand-ins for the texts while the template is cut up: private-use characters, which no template
# writes or trims.
_QUESTION, _ANSWER, _FOLLOW_UP, _SYSTEM = "\ue001", "\ue002", "\ue003", "\ue004"


class ChatPrompts:
    """Token ids of a conversation about pictures, one placeholder for each.

    Args:
        processor: Holds the tokenizer and the multimodal chat template.
        num_image_tokens: Patch tokens of a picture.

    Attributes:
        prefix_ids: System message, user header and one picture's placeholders, all N of them.
        image_token_id: Id of the placeholder.
        end_of_turn_ids: Ids that end an answer, one or more.
        template: The rendered prompt with ``{question}`` for the question, for the record.
    """

    def __init__(self, processor: LlavaProcessor, num_image_tokens: int) -> None:
        self._processor = processor
        self._header = lru_cache(maxsize=256)(self._header_ids)
        self._header_text = lru_cache(maxsize=4)(self._render_header)
        self._tokenizer = processor.tokenizer
        self.image_token_id: int = self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        control_tokens = [
            token.content
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special
        ]
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)))

        prompt = self._render([_user(_QUESTION, with_image=True)])
        answer: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
        follow_up: dict[str, Any] = {"role": "user", "content": _FOLLOW_UP}
        conversation = self._render([_user(_QUESTION, with_image=True), answer, follow_up])
        rest = conversation.removeprefix(prompt)
        before_image, image, after_image = prompt.partition(IMAGE_TOKEN)
        # Vicuna's prompt ends with "ASSISTANT:", and its answer begins with a space.
        before_answer, found, between = rest.partition(_ANSWER)
        if not image or prompt.count(_QUESTION) != 1 or not found or before_answer.strip():
            raise InputError(
                "the chat template does not continue a question with its answer, so that prompts"
                " cannot be cut into prefix, question and answer"
            )
        self.template = prompt.replace(_QUESTION, "{question}")
        self._before_question, self._after_question = after_image.split(_QUESTION)
        between, self._after_follow_up = between.split(_FOLLOW_UP)
        end = self._control.search(between)
        if end is None:
            raise InputError(
                "the chat template does not end an answer with a special token such as"
                f" {self._tokenizer.eos_token!r}"
            )
        self._before_answer = before_answer
        self._after_answer, self._before_follow_up = between[: end.end()], between[end.end() :]
        self._end_of_turn = end.group()

        self._bos = _bos_outside(self._tokenizer, prompt)
        self._text_header = self._header_text(None, with_image=False).rstrip()
        self._text_header_ids = self._ids(self._text_header)

        self._before_image = self._bos + self._ids(before_image)
        self.prefix_ids: list[int] = self._before_image + [self.image_token_id] * num_image_tokens
        end_ids = [self._tokenizer.convert_tokens_to_ids(self._end_of_turn)]
        self.end_of_turn_ids: list[int] = list(
            dict.fromkeys([*end_ids, self._tokenizer.eos_token_id])
        )

    def opening_ids(self, num_images: int = 1, system: str | None = None) -> list[int]:
        """System message, user header and the pictures that stand before the first question.

        Args:
            num_images: Placeholders that follow.
            system: Another system message than the template's own.

        Raises:
            InputError: The template takes no system message.
        """
        if num_images == 0:
            return self._bos + self._header(system, with_image=False)
        if system is None:
            before = self._before_image
        else:
            before = self._bos + self._header(system, with_image=True)
        between = self._typed(IMAGE_TOKEN, self._before_question, "", "")
        pictures = [self.image_token_id, *(between + [self.image_token_id]) * (num_images - 1)]
        return before + pictures

    def question_ids(
        self, question: Question, after_image: bool = True, system: str | None = None
    ) -> list[int]:
        """What follows the opening: the question and the header of the answer.

        Args:
            question: Its text; texts with a picture between each two.
            after_image: The opening ends with a picture.
            system: The opening's system message.
        """
        if after_image:
            return self._asked(IMAGE_TOKEN, self._before_question, question, self._after_question)
        # A question right after the header takes the white space between them along: that is the
        # most that text merges with.
        header = self._header_text(None if system is None else _SYSTEM, with_image=False)
        space = header[len(header.rstrip()) :]
        before = self._text_header_ids
        whole = self._asked("", self._text_header + space, question, self._after_question)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self._asked(self._end_of_turn, space, question, self._after_question)

    def answer_ids(self, answer: str) -> list[int]:
        """An answer with its end-of-turn token, as it follows the answer's header."""
        header = self._after_question
        before = self._ids(header)
        text = self._before_answer + clean_text(answer)
        whole = self._typed("", header, text, self._after_answer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        # A tokenizer that merges header and answer: the header stands by then, so the answer is
        # tokenised alone, as it must be at inference.
        return self._typed(self._end_of_turn, "", text, self._after_answer)

    def follow_up_ids(self, question: Question) -> list[int]:
        """What follows an answer's end-of-turn: the next question and the header of its answer."""
        return self._asked(
            self._end_of_turn, self._before_follow_up, question, self._after_follow_up
        )

    def _render(self, messages: list[dict[str, Any]]) -> str:
        rendered: str = self._processor.apply_chat_template(messages, add_generation_prompt=True)
        return rendered

    def _header_ids(self, system: str | None, with_image: bool) -> list[int]:
        """What stands before the first question or its picture, tokenised."""
        header = self._header_text(None if system is None else _SYSTEM, with_image)
        if not with_image:
            header = header.rstrip()
        if system is None:
            return self._ids(header)
        before, found, after = header.partition(_SYSTEM)
        if not found:
            raise InputError("the chat template does not show a system message")
        return self._typed("", before, clean_text(system), after)

    def _render_header(self, system: str | None, with_image: bool) -> str:
        messages = [_user(_QUESTION, with_image)]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        try:
            rendered = self._render(messages)
        except TemplateError as error:
            raise InputError(f"the chat template takes no system message ({error})") from error
        return rendered.partition(IMAGE_TOKEN if with_image else _QUESTION)[0]

    def _asked(self, anchor: str, before: str, question: Question, after: str) -> list[int]:
        """Ids of a question with its pictures' placeholders."""
        if isinstance(question, str):
            return self._typed(anchor, before, clean_text(question), after)
        texts = [_valid_unicode(text) for text in question]
        texts[0], texts[-1] = texts[0].lstrip(), texts[-1].rstrip()
        ids: list[int] = []
        for number, text in enumerate(texts):
            is_last = number == len(texts) - 1
            ids += self._typed(anchor, before, text, after if is_last else "")
            if not is_last:
                ids.append(self.image_token_id)
            anchor, before = IMAGE_TOKEN, ""
        return ids

    def _typed(self, anchor: str, before: str, text: str, after: str) -> list[int]:
        """Ids of ``before + text + after`` where they follow the special token ``anchor``.

        ``before`` and ``after`` are the template's; ``text`` is somebody's, and what looks like a
        special token in it is text. Tokenising behind the anchor keeps sentencepiece tokenizers
        from starting the piece as if it were a text of its own.
        """
        num_anchor = 1 if anchor else 0
        if not self._control.search(text):
            return self._ids(anchor + before + text + after)[num_anchor:]
        control_before, run_before = self._split_after_last_control(before)
        run_after, control_after = self._split_before_first_control(after)
        ids = self._ids(anchor + control_before)[num_anchor:]
        ids += self._ids(run_before + text + run_after, split_special_tokens=True)
        return ids + self._ids(control_after)

    def _split_after_last_control(self, text: str) -> tuple[str, str]:
        ends = [match.end() for match in self._control.finditer(text)]
        cut = ends[-1] if ends else 0
        return text[:cut], text[cut:]

    def _split_before_first_control(self, text: str) -> tuple[str, str]:
        match = self._control.search(text)
        cut = match.start() if match else len(text)
        return text[:cut], text[cut:]

    def _ids(self, text: str, split_special_tokens: bool = False) -> list[int]:
        return self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens
        )


def _user(text: str, with_image: bool = False) -> dict[str, Any]:
    pictures = [{"type": "image"}] if with_image else []
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def _bos_outside(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """``[bos]`` where the tokenizer opens texts with one and the template leaves that to it."""
    opened: list[int] = tokenizer.encode("")
    if opened[:1] != [tokenizer.bos_token_id] or rendered.startswith(tokenizer.bos_token):
        return []
    return opened[:1]


def clean_text(text: str) -> str:
    """``text`` without outer white space, and with anything that is not Unicode replaced."""
    return _valid_unicode(text).strip()


def _valid_unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
