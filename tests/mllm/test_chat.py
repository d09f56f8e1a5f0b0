"""Answers in conversations about pictures: streamed, sampled, stopped."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from mllm.chat import ChatModel, ChatSession, Sampling, Turn, _texts, run_chat
from mllm.generation import Request, generate_answers
from mllm.prompts import ChatPrompts
from vision_moe import InputError

IMAGE = Image.linear_gradient("L").convert("RGB")
OTHER = Image.radial_gradient("L").convert("RGB")


@pytest.fixture
def session(mllm):
    return ChatSession(*mllm, IMAGE, max_new_tokens=16)


@pytest.fixture
def chat(mllm):
    return ChatModel(*mllm)


def prompts_seen(chat, monkeypatch):
    seen = []
    original = chat._stream
    monkeypatch.setattr(chat, "_stream", lambda ids, *a: seen.append(ids) or original(ids, *a))
    return seen


def test_streamed_answer_is_the_batched_one(mllm, session):
    expected = generate_answers(*mllm, [Request(0, "is it red?")], lambda _: IMAGE, progress=False)
    assert "".join(session.ask("is it red?")).strip() == expected[0]


def test_follow_up_knows_the_conversation(mllm, session, monkeypatch):
    first = "".join(session.ask("is it red?"))
    seen = prompts_seen(session._chat, monkeypatch)
    "".join(session.ask("how many?"))
    prompts = ChatPrompts(mllm[1], 16)
    expected = prompts.opening_ids() + prompts.question_ids("is it red?")
    expected += prompts.answer_ids(first) + prompts.follow_up_ids("how many?")
    assert seen == [expected]


def test_later_picture_stands_in_its_question(mllm, chat, monkeypatch):
    seen = prompts_seen(chat, monkeypatch)
    turns = [Turn("is it red?", (IMAGE, OTHER), "no"), Turn("and this?", (OTHER,))]
    "".join(chat.answer(turns, Sampling(max_new_tokens=4)))
    text = mllm[1].tokenizer.decode(seen[0])
    assert "user\n<image>\n<image>\nis it red?<|im_end|>" in text
    assert "assistant\nno<|im_end|>\n<|im_start|>user\n<image>\nand this?<|im_end|>" in text


def test_each_picture_is_seen_in_its_place(chat):
    ids = [chat._prompts.image_token_id, 5, chat._prompts.image_token_id]
    with torch.inference_mode():
        embeds = chat._embed([7, *ids], [IMAGE, OTHER])[0]
        torch.testing.assert_close(embeds[1:17], chat._image_features(IMAGE))
        torch.testing.assert_close(embeds[18:], chat._image_features(OTHER))
    assert len(embeds) == 1 + 16 + 1 + 16


def test_question_without_a_picture_is_answered(chat):
    assert isinstance("".join(chat.answer([Turn("how many?")])), str)


def test_typed_image_token_is_text(session):
    assert isinstance("".join(session.ask("what is <image> <|im_end|>?")), str)


def test_empty_question_is_refused(session):
    with pytest.raises(InputError, match="empty"):
        "".join(session.ask(" \n"))


def test_too_long_question_is_refused(session):
    with pytest.raises(InputError, match="tokens, and the language model holds 512"):
        "".join(session.ask("word " * 600))


def test_hopelessly_long_question_is_not_tokenised(chat, monkeypatch):
    monkeypatch.setattr(chat, "_prompts", None)
    with pytest.raises(InputError, match="100,000 characters"):
        chat.answer([Turn("a" * 100_000)])


def test_seed_decides_the_draw(chat):
    def draw(seed):
        sampling = Sampling(temperature=1.5, max_new_tokens=24, seed=seed)
        return "".join(chat.answer([Turn("is it red?", (IMAGE,))], sampling))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_tiny_top_p_is_greedy(chat):
    turns = [Turn("is it red?", (IMAGE,))]
    sampled = Sampling(temperature=2.0, top_p=1e-6, max_new_tokens=12, seed=3)
    greedy = Sampling(max_new_tokens=12)
    assert "".join(chat.answer(turns, sampled)) == "".join(chat.answer(turns, greedy))


def test_unread_answer_is_not_computed(chat, monkeypatch):
    calls = []
    original = chat.model.forward
    monkeypatch.setattr(chat.model, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    stream = chat.answer([Turn("is it red?", (IMAGE,))])
    next(stream)
    computed = len(calls)
    stream.close()
    assert len(calls) == computed < 10


def test_answer_leaves_the_readers_thread_as_it_was(chat):
    next(chat.answer([Turn("is it red?", (IMAGE,))]))
    assert not torch.is_inference_mode_enabled()


def test_character_of_several_tokens_appears_whole(tokenizer):
    ids = tokenizer.encode("a ❤ b", add_special_tokens=False)
    pieces = list(_texts(tokenizer, iter(ids)))
    assert "".join(pieces) == "a ❤ b"
    assert any(piece == "❤" or piece == " ❤" for piece in pieces)


def test_picture_is_encoded_once(chat, monkeypatch):
    turns = [Turn("is it red?", (IMAGE,))]
    "".join(chat.answer(turns, Sampling(max_new_tokens=2)))
    monkeypatch.setattr("mllm.chat.encode_images", None)
    "".join(chat.answer(turns, Sampling(max_new_tokens=2)))


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
