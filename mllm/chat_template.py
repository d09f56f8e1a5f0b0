"""A multimodal chat template made of a language model's own.

The language model's template knows messages with a plain string. The wrapper turns a content list
into that string and leaves the rest to the original, so that the rendered text has the format the
language model was tuned on. A message's only picture comes first, as LLaVA has it (``<image>``,
newline, text); several stand where they are, those before any text with a newline after each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AddedToken

from vision_moe import InputError

IMAGE_TOKEN = "<image>"

_PREAMBLE = """\
{%- set chat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set chat.messages = chat.messages + [message] -%}
{%- else -%}
{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set turn = namespace(text='<image>\\n' if pictures == 1 else '', leads=true) -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' and pictures > 1 -%}
{%- set turn.text = turn.text + ('<image>\\n' if turn.leads else '<image>') -%}
{%- elif part['type'] == 'text' -%}
{%- set turn.text = turn.text + part['text'] -%}
{%- set turn.leads = false -%}
{%- endif -%}
{%- endfor -%}
{%- set chat.messages = chat.messages + [dict(message, content=turn.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = chat.messages -%}
"""


def multimodal_chat_template(text_template: str) -> str:
    """``text_template`` (Jinja), taking content lists with pictures as well as plain strings."""
    return _PREAMBLE + text_template


@dataclass(frozen=True)
class ChatTemplate:
    """A published chat format, for language models whose tokenizer has none of its own.

    Attributes:
        text: Jinja, over messages with plain strings.
        end_of_turn: Ends an answer; the tokenizer's own end of sequence if it is ``None``.
        other_tokens: Special tokens that the format writes.
    """

    text: str
    end_of_turn: str | None = None
    other_tokens: tuple[str, ...] = ()


CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    # Vicuna 1.1 and 1.5, LLaVA's "v1".
    "v1": ChatTemplate(
        "{%- if messages[0]['role'] == 'system' -%}"
        "{{ messages[0]['content'] + ' ' }}{%- set messages = messages[1:] -%}"
        "{%- else -%}{{ 'A chat between a curious user and an artificial intelligence assistant."
        " The assistant gives detailed, helpful, and polite answers to the user\\'s questions. ' }}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}"
        "{%- else -%}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    ),
    "llama2": ChatTemplate(
        "{%- set chat = namespace(system='') -%}"
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set chat.system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}"
        "{%- set messages = messages[1:] -%}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        "{{ bos_token + '[INST] ' + (chat.system if loop.first else '') + message['content']"
        " + ' [/INST]' }}"
        "{%- else -%}{{ ' ' + message['content'] + ' ' + eos_token }}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "llama3": ChatTemplate(
        "{{ bos_token }}"
        "{%- for message in messages -%}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] + '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}",
        end_of_turn="<|eot_id|>",
        other_tokens=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "chatml": ChatTemplate(
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
        end_of_turn="<|im_end|>",
        other_tokens=("<|im_start|>",),
    ),
}


def set_chat_template(tokenizer: Any, name: str, may_grow: bool = True) -> None:
    """Give a tokenizer a published chat format, and the special tokens that it needs.

    Args:
        tokenizer: Changed in place.
        name: One of :data:`CHAT_TEMPLATES`.
        may_grow: New tokens may be added: the model's embeddings are yet to be fitted to them.

    Raises:
        InputError: A token is missing and may not be added.
    """
    template = CHAT_TEMPLATES[name]
    needed = [token for token in (*template.other_tokens, template.end_of_turn) if token]
    missing = [token for token in needed if token not in tokenizer.get_vocab()]
    if missing and not may_grow:
        raise InputError(
            f"chat template '{name}' needs the token {missing[0]!r}, which the model does not have"
        )
    tokens = [AddedToken(token, normalized=False, special=True) for token in needed]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if template.end_of_turn:
        tokenizer.eos_token = template.end_of_turn
    tokenizer.chat_template = template.text
