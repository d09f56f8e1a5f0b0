"""Chat-template pieces: the prefix with the picture, a question's branch, an answer.

A rendered turn is cut at the picture and at the answer:

    <|im_start|>system ... <|im_start|>user\\n <image> x N | \\n question <|im_end|> ... assistant\\n | answer <|im_end|>
    prefix                                               | question                             | answer

The prefix is the same for every question about a picture, so training and generation compute it
once. Token ids of the pieces, laid end to end, are those of the rendered conversation: a special
token stands at each cut, and text never merges with one.
"""  # noqa: E501

from __future__ import annotations

import re
from typing import Any

from transformers import LlavaProcessor

from mllm.chat_template import IMAGE_TOKEN
from vision_moe import InputError

# Stand-ins for the texts while the template is cut up: private-use characters, which no template
# writes or trims.
_QUESTION, _ANSWER, _FOLLOW_UP = "\ue001", "\ue002", "\ue003"


class ChatPrompts:
    """Token ids of a conversation about one picture.

    Args:
        processor: Holds the tokenizer and the multimodal chat template.
        num_image_tokens: Patch tokens of a picture.

    Attributes:
        prefix_ids: System message, user header and the picture's placeholders.
        image_token_id: Id of the placeholder.
        end_of_turn_ids: Ids that end an answer, one or more.
        template: The rendered prompt with ``{question}`` for the question, for the record.
    """

    def __init__(self, processor: LlavaProcessor, num_image_tokens: int) -> None:
        self._tokenizer = processor.tokenizer
        self.image_token_id: int = self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        eos = self._tokenizer.eos_token
        control_tokens = [
            token.content
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special
        ]
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)))

        user: dict[str, Any] = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}],
        }
        answer: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
        follow_up: dict[str, Any] = {"role": "user", "content": _FOLLOW_UP}
        prompt = processor.apply_chat_template([user], add_generation_prompt=True)
        conversation = processor.apply_chat_template(
            [user, answer, follow_up], add_generation_prompt=True
        )
        rest = conversation.removeprefix(prompt)
        before_image, image, after_image = prompt.partition(IMAGE_TOKEN)
        if not image or prompt.count(_QUESTION) != 1 or not rest.startswith(_ANSWER):
            raise InputError(
                "the chat template does not continue a question with its answer, so that prompts"
                " cannot be cut into prefix, question and answer"
            )
        self.template = prompt.replace(_QUESTION, "{question}")
        self._before_question, self._after_question = after_image.split(_QUESTION)
        between, self._after_follow_up = rest.removeprefix(_ANSWER).split(_FOLLOW_UP)
        end_of_answer, found, self._before_follow_up = between.partition(eos)
        if not found:
            raise InputError(f"the chat template does not end an answer with {eos!r}")
        self._after_answer = end_of_answer + eos
        self._eos = eos

        self.prefix_ids: list[int] = (
            self._ids(before_image) + [self.image_token_id] * num_image_tokens
        )
        self.end_of_turn_ids: list[int] = [self._tokenizer.eos_token_id]

    def question_ids(self, question: str) -> list[int]:
        """What follows the picture: the question and the header of the answer."""
        return self._typed(
            IMAGE_TOKEN, self._before_question, clean_text(question), self._after_question
        )

    def answer_ids(self, answer: str) -> list[int]:
        """An answer with its end-of-turn token, as it follows the answer's header."""
        header = self._after_question
        before = self._ids(header)
        whole = self._typed("", header, clean_text(answer), self._after_answer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        # A tokenizer that merges header and answer: the header stands by then, so the answer is
        # tokenised alone, as it must be at inference.
        return self._typed(self._eos, "", clean_text(answer), self._after_answer)

    def follow_up_ids(self, question: str) -> list[int]:
        """What follows an answer's end-of-turn: the next question and the header of its answer."""
        return self._typed(
            self._eos, self._before_follow_up, clean_text(question), self._after_follow_up
        )

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


def clean_text(text: str) -> str:
    """``text`` without outer white space, and with anything that is not Unicode replaced."""
    return text.encode("utf-8", "replace").decode("utf-8").strip()
