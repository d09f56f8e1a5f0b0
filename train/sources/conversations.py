"""Records -> conversations: LLaVA's ``conversations`` and Hugging Face's chat ``messages``.

LLaVA:        {"id", "image": path | [paths] | absent,
               "conversations": [{"from": "human" | "gpt", "value": "...<image>..."}]}
Hugging Face: {"messages": [{"role": "user" | "assistant",
               "content": text | [{"type": "image", "image": path}, {"type": "text", "text"}]}],
               "images": [paths]}

In both a system message may come first, and pictures may be bytes, where the format has them.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

from mllm.prompts import Question

PLACEHOLDER = "<image>"

# A path, or the picture's own bytes.
ImageReference: TypeAlias = str | bytes

_USER, _ASSISTANT, _SYSTEM = "user", "assistant", "system"
_ROLES = {
    "human": _USER, "gpt": _ASSISTANT, "user": _USER, "assistant": _ASSISTANT, "system": _SYSTEM,
}  # fmt: skip
_PICTURE = object()  # stands in a message for a picture


class RecordFault(ValueError):
    """What is wrong with a record, without its name."""


@dataclass(frozen=True)
class Conversation:
    """A record that holds together.

    Attributes:
        images: In the order in which they stand in the text.
        turns: As in :class:`train.instruction_rows.InstructionSample`.
        system: The system message, if there is one.
    """

    images: list[ImageReference]
    turns: tuple[tuple[Question, str], ...]
    system: str | None


def parse_record(record: Any) -> Conversation:
    """Read one record of either kind.

    Raises:
        RecordFault: It is no conversation, or its pictures and placeholders do not agree.
    """
    if not isinstance(record, dict):
        raise RecordFault("is no object")
    if "conversations" in record:
        messages, images = _llava_messages(record)
    elif "messages" in record:
        messages, images = _chat_messages(record)
    else:
        raise RecordFault("has neither 'conversations' nor 'messages'")
    system = None
    if messages and messages[0][0] == _SYSTEM:
        system = _text_only(messages.pop(0), "the system message")
    if not messages:
        raise RecordFault("its conversation is empty")
    for number, (role, _) in enumerate(messages):
        if role != (_USER, _ASSISTANT)[number % 2]:
            raise RecordFault(
                f"turn {number} is the {role}'s: user and assistant must alternate, the user first"
            )
    if len(messages) % 2:
        raise RecordFault("its last question has no answer")
    num_placeholders = sum(part is _PICTURE for _, parts in messages for part in parts)
    if num_placeholders != len(images):
        raise RecordFault(
            f"{num_placeholders} {PLACEHOLDER} placeholders but {_count(len(images), 'image')}"
        )
    turns = []
    for number in range(0, len(messages), 2):
        answer = _text_only(messages[number + 1], f"answer {number // 2}")
        if not answer.strip():
            raise RecordFault(f"answer {number // 2} is empty")
        turns.append((_question(messages[number][1], is_first=number == 0), answer))
    return Conversation(images, tuple(turns), system)


# A message: who speaks, and texts and pictures in their order.
_Message: TypeAlias = tuple[str, list[Any]]


def _llava_messages(record: dict[str, Any]) -> tuple[list[_Message], list[ImageReference]]:
    conversations = record["conversations"]
    if not isinstance(conversations, list):
        raise RecordFault("'conversations' is no list")
    messages: list[_Message] = []
    for number, message in enumerate(conversations):
        role = _role(message, "from", number)
        value = message.get("value")
        if not isinstance(value, str):
            raise RecordFault(f"message {number} has no text as its 'value'")
        messages.append((role, _split(value)))
    images = record.get("image", record.get("images"))
    return messages, _references(images)


def _chat_messages(record: dict[str, Any]) -> tuple[list[_Message], list[ImageReference]]:
    raw = record["messages"]
    if not isinstance(raw, list):
        raise RecordFault("'messages' is no list")
    messages: list[_Message] = []
    inline: list[ImageReference] = []
    for number, message in enumerate(raw):
        role, content = _role(message, "role", number), message.get("content")
        if isinstance(content, str):
            messages.append((role, _split(content)))
            continue
        if not isinstance(content, list):
            raise RecordFault(f"message {number} has no text and no list as its 'content'")
        parts: list[Any] = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            elif kind in ("image", "image_url"):
                parts.append(_PICTURE)
                own = next((part[k] for k in _IMAGE_KEYS if part.get(k) is not None), None)
                if own is not None:
                    inline.append(_reference(own))
            else:
                raise RecordFault(f"message {number} has a part of unknown type {kind!r}")
        messages.append((role, parts))
    listed = _references(record.get("images", record.get("image")))
    if inline and listed:
        raise RecordFault("pictures stand both in the messages and in 'images'")
    return messages, inline or listed


_IMAGE_KEYS = ("image", "path", "url", "image_url", "bytes")


def _role(message: Any, key: str, number: int) -> str:
    if not isinstance(message, dict):
        raise RecordFault(f"message {number} is no object")
    role = message.get(key)
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordFault(f"message {number} has the unknown role {role!r} as its '{key}'")
    return _ROLES[role]


def _references(images: Any) -> list[ImageReference]:
    if images is None:
        return []
    return [_reference(one) for one in (images if isinstance(images, list) else [images])]


def _reference(image: Any) -> ImageReference:
    if isinstance(image, dict):  # as `datasets` has a picture that is not decoded
        image = image.get("bytes") or image.get("path") or image.get("url")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise RecordFault(f"a picture is {str(image)[:80]!r}, it must be a path")
    if image.startswith(("http://", "https://", "data:")):
        raise RecordFault(f"the picture {image[:80]!r} is an address; only files are read")
    return image


def _split(text: str) -> list[Any]:
    parts: list[Any] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append(_PICTURE)
        if piece:
            parts.append(piece)
    return parts


def _text_only(message: _Message, what: str) -> str:
    if _PICTURE in message[1]:
        raise RecordFault(f"{what} holds a picture; only questions may")
    return "".join(message[1])


def _question(parts: list[Any], is_first: bool) -> Question:
    """The question as a row has it, laid out as the chat template lays it out.

    One picture comes first; of several, those before any text have a line each, and the others
    stand where they are. Pictures before the first question are no part of it.
    """
    num_pictures = sum(part is _PICTURE for part in parts)
    if num_pictures <= 1:
        text = "".join(part for part in parts if part is not _PICTURE).strip()
        return text if is_first or not num_pictures else ("", f"\n{text}")
    texts = [""]
    leads = True
    for part in parts:
        if part is _PICTURE:
            texts.append("\n" if leads else "")
        elif leads:
            texts[-1] += part.lstrip()
            leads = not part.strip()
        else:
            texts[-1] += part
    if is_first and not texts[0] and all(text == "\n" for text in texts[1:-1]):
        return texts[-1].strip()
    return tuple(texts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
