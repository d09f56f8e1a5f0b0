"""Conversations as the page shows them."""

from __future__ import annotations

import pytest

from demo.conversation import (
    Exchange,
    Speed,
    answer,
    as_markdown,
    as_text,
    exchange_of_message,
    from_text,
    last_picture,
    messages,
)
from mllm.chat import Sampling

TWO = (Exchange("a?", ("x.png", "y.png"), "one"), Exchange("b?", (), "two"))


def test_each_picture_question_and_answer_is_a_message():
    roles = [(one["role"], one["content"]) for one in messages(TWO)]
    assert roles == [
        ("user", {"path": "x.png"}),
        ("user", {"path": "y.png"}),
        ("user", "a?"),
        ("assistant", "one"),
        ("user", "b?"),
        ("assistant", "two"),
    ]


@pytest.mark.parametrize(("index", "exchange"), [(0, 0), (3, 0), (4, 1), ([5, 0], 1), (9, 1)])
def test_message_belongs_to_its_exchange(index, exchange):
    assert exchange_of_message(TWO, index) == exchange


def test_answer_to_come_is_not_shown():
    waiting = (Exchange("a?"),)
    assert [one["role"] for one in messages(waiting, pending=True)] == ["user"]
    assert messages(waiting)[-1]["content"] == "*(no answer)*"


def test_last_picture():
    assert last_picture(TWO) == "y.png"
    assert last_picture(()) is None


def test_typed_tags_are_text_and_come_back():
    typed = "what is <image> & <b>that</b>?"
    assert "<" not in as_text(typed)
    assert from_text(as_text(typed)) == typed


def test_answers_tags_and_pictures_are_text():
    shown = as_markdown("<script>x</script> ![a](http://host/a.png) **b** `1 < 2`")
    assert shown == "&lt;script&gt;x&lt;/script&gt; !\\[a](http://host/a.png) **b** `1 < 2`"


def test_answer_grows_to_the_whole(chat_model, photo):
    asked = (Exchange("is it red?", (str(photo),)),)
    updates = list(answer(chat_model, asked, Sampling(max_new_tokens=12), 10**6))
    texts = [update[-1].answer for update in updates]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert updates[-1][-1].speed.num_tokens >= 1


def test_another_attempt_draws_another_answer(chat_model):
    def draw(attempt):
        asked = (Exchange("is it red?", attempt=attempt),)
        sampling = Sampling(temperature=1.5, max_new_tokens=16)
        return list(answer(chat_model, asked, sampling, 10**6))[-1][-1].answer

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_speed_of_one_token_has_no_rate():
    assert str(Speed(0.5, 0.6, 1)) == "first token after 0.50 s"
    assert str(Speed(0.5, 1.5, 11)) == "first token after 0.50 s, then 10.0 tokens/s"
