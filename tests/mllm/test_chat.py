"""One answer, or a conversation, about one picture."""

from __future__ import annotations

import io
import threading

import pytest
from PIL import Image

from mllm.chat import ChatSession, run_chat
from mllm.generation import Request, generate_answers
from mllm.prompts import ChatPrompts
from vision_moe import InputError

IMAGE = Image.linear_gradient("L").convert("RGB")


@pytest.fixture
def session(mllm):
    return ChatSession(*mllm, IMAGE, max_new_tokens=16)


def test_streamed_answer_is_the_batched_one(mllm, session):
    expected = generate_answers(*mllm, [Request(0, "is it red?")], lambda _: IMAGE, progress=False)
    assert "".join(session.ask("is it red?")).strip() == expected[0]


def test_follow_up_knows_the_conversation(mllm, session, monkeypatch):
    first = "".join(session.ask("is it red?"))
    seen = []
    original = session._stream
    monkeypatch.setattr(session, "_stream", lambda ids: seen.append(ids) or original(ids))
    "".join(session.ask("how many?"))
    prompts = ChatPrompts(mllm[1], 16)
    expected = prompts.prefix_ids + prompts.question_ids("is it red?")
    expected += prompts.answer_ids(first) + prompts.follow_up_ids("how many?")
    assert seen == [expected]


def test_typed_image_token_is_text(session):
    assert isinstance("".join(session.ask("what is <image> <|im_end|>?")), str)


def test_empty_question_is_refused(session):
    with pytest.raises(InputError, match="empty"):
        "".join(session.ask(" \n"))


def test_too_long_question_is_refused(session):
    with pytest.raises(InputError, match="tokens, and the language model holds 512"):
        "".join(session.ask("word " * 600))


def test_abandoned_answer_leaves_no_thread(session):
    before = threading.active_count()
    stream = session.ask("is it red?")
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_fault_during_generation_reaches_the_caller(session, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session._model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        "".join(session.ask("is it red?"))


def test_single_answer_is_all_of_stdout(mllm, capsys):
    run_chat(*mllm, IMAGE, "is it red?")
    first = capsys.readouterr().out
    assert first.strip() == "".join(ChatSession(*mllm, IMAGE).ask("is it red?")).strip()


def test_terminal_chat_answers_each_line_and_ends(mllm, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("is it red?\nhow many?\n"))
    run_chat(*mllm, IMAGE)
    session = ChatSession(*mllm, IMAGE)
    expected = ["".join(session.ask(question)) for question in ("is it red?", "how many?")]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)
