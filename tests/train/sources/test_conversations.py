"""What a record says, and what is wrong with it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.sources.conversations import RecordFault, parse_record

IMAGE = {"type": "image"}


def llava(*values: str, image: Any = "cat.png") -> dict[str, Any]:
    speakers = ("human", "gpt")
    messages = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": 1, "image": image, "conversations": messages}


def chat(*contents: Any, images: Any = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages, "images": images}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "value", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it?<image>"]
)
def test_only_picture_leaves_the_first_question(value: str) -> None:
    conversation = parse_record(llava(value, "A cat."))
    assert conversation.images == ["cat.png"]
    assert conversation.turns == (("What is it?", "A cat."),)


def test_text_only_record_has_no_pictures() -> None:
    conversation = parse_record(llava("Hello", "Hi", image=None))
    assert conversation.images == []
    assert conversation.turns == (("Hello", "Hi"),)


def test_pictures_in_a_line_each_come_first() -> None:
    conversation = parse_record(llava("<image>\n<image>\nCompare.", "Same.", image=["a", "b"]))
    assert conversation.images == ["a", "b"]
    assert conversation.turns == (("Compare.", "Same."),)


def test_pictures_within_the_text_stay_there() -> None:
    turns = parse_record(llava("Is <image> like <image>?", "No.", image=["a", "b"])).turns
    assert turns == ((("Is ", " like ", "?"), "No."),)


def test_picture_of_a_later_turn_comes_first_in_it() -> None:
    record = llava("<image>\nWhat?", "A cat.", "And this? <image>", "A dog.", image=["a", "b"])
    assert parse_record(record).turns == (("What?", "A cat."), (("", "\nAnd this?"), "A dog."))


def test_chat_messages_are_read_as_llava_ones() -> None:
    content = [text("Is "), {"type": "image", "image": "a"}, text(" like "),
               {"type": "image", "path": "b"}, text("?")]  # fmt: skip
    conversation = parse_record(chat(content, [text("No.")]))
    assert conversation.images == ["a", "b"]
    assert conversation.turns == ((("Is ", " like ", "?"), "No."),)


def test_chat_pictures_may_stand_beside_the_messages() -> None:
    conversation = parse_record(chat([IMAGE, text("What?")], "A cat.", images=[{"bytes": b"x"}]))
    assert conversation.images == [b"x"]
    assert conversation.turns == (("What?", "A cat."),)


def test_system_message_comes_first() -> None:
    record = chat("Hello", "Hi")
    record["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert parse_record(record).system == "Be brief."


FAULTS: dict[str, Any] = {
    "is no object": [],
    "neither 'conversations' nor 'messages'": {"id": 1},
    "'conversations' is no list": {"conversations": "x"},
    "conversation is empty": {"conversations": []},
    "unknown role 'tool'": {"conversations": [{"from": "tool", "value": "x"}]},
    "unknown role None": {"conversations": [{"value": "x"}]},
    "message 0 has no text": {"conversations": [{"from": "human"}]},
    "message 0 is no object": {"conversations": ["x"]},
    "must alternate": {"conversations": [{"from": "gpt", "value": "x"}] * 2},
    "last question has no answer": llava("<image>What?"),
    "0 <image> placeholders but 1 image": llava("What?", "A cat."),
    "2 <image> placeholders but 1 image": llava("<image><image>What?", "A cat."),
    "1 <image> placeholders but 0 images": llava("<image>What?", "A cat.", image=None),
    "1 <image> placeholders but 2 images": llava("<image>What?", "A cat.", image=["a", "b"]),
    "answer 0 holds a picture": llava("What?", "A <image>."),
    "answer 0 is empty": llava("<image>What?", " "),
    "a picture is '7', it must be a path": llava("<image>What?", "A cat.", image=7),
    "is an address": llava("<image>What?", "A cat.", image="https://x.example/a.png"),
    "message 0 has no text and no list": chat(None, "x"),
    "unknown type 'video'": chat([{"type": "video"}], "x"),
    "pictures stand both": chat([{"type": "image", "image": "a"}], "x", images=["b"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(fault: str) -> None:
    with pytest.raises(RecordFault) as caught:
        parse_record(FAULTS[fault])
    assert fault in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("<image>"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["conversations", "messages", "from", "value", "role", "content", "image", "type"]
            ),
            inner | st.sampled_from(["human", "gpt", "user", "assistant", "image", "text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_hostile_record_gives_a_conversation_or_a_fault(record: Any) -> None:
    try:
        conversation = parse_record(record)
    except RecordFault:
        return
    num_within = sum(len(q) - 1 for q, _ in conversation.turns if isinstance(q, tuple))
    assert conversation.turns and num_within <= len(conversation.images)
