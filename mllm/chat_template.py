"""A multimodal chat template made of a language model's own.

The language model's template knows messages with a plain string. The wrapper turns a content list
into that string and leaves the rest to the original, so that the rendered text has the format the
language model was tuned on. A message's only picture comes first, as LLaVA has it (``<image>``,
newline, text); several stand where they are, those before any text with a newline after each.
"""

from __future__ import annotations

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
