"""A multimodal chat template made of a language model's own.

The language model's template knows messages with a plain string. The wrapper turns a content list
into that string, pictures first as LLaVA has them (``<image>``, newline, text), and leaves the rest
to the original, so that the rendered text has the format the language model was tuned on.
"""

from __future__ import annotations

IMAGE_TOKEN = "<image>"

_PREAMBLE = """\
{%- set chat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set chat.messages = chat.messages + [message] -%}
{%- else -%}
{%- set turn = namespace(images='', text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set turn.images = turn.images + '<image>\\n' -%}
{%- elif part['type'] == 'text' -%}
{%- set turn.text = turn.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- set chat.messages = chat.messages + [dict(message, content=turn.images + turn.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = chat.messages -%}
"""


def multimodal_chat_template(text_template: str) -> str:
    """``text_template`` (Jinja), taking content lists with pictures as well as plain strings."""
    return _PREAMBLE + text_template
