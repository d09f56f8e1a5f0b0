"""CIDEr-D against values worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.scoring import caption_words, cider
from vision_moe import InputError

WORDS = st.sampled_from(["red", "blue", "cat", "dog", "on", "the", "mat"])
CAPTIONS = st.lists(WORDS, max_size=9).map(" ".join)
CORPORA = st.lists(
    st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=1, max_size=3)), min_size=1, max_size=5
)
OTHER = "b dog"  # the reference of a second image, so that log(2 / 1) weighs the first one's words


def first_score(prediction: str, references: list[str]) -> float:
    return cider([prediction, ""], [references, [OTHER]]).per_item[0]


def test_the_same_caption_scores_ten() -> None:
    assert first_score("one two three four", ["one two three four"]) == pytest.approx(10)


def test_a_caption_of_two_words_reaches_half_because_it_has_no_trigrams() -> None:
    assert first_score("red cat", ["red cat"]) == pytest.approx(5)


def test_a_shorter_caption_pays_the_gaussian_of_the_length() -> None:
    # n = 1: L * L / (L * L sqrt(2)); no bigram in "red"; one word of difference.
    expected = 10 / 4 / math.sqrt(2) * math.exp(-1 / 72)
    assert first_score("red", ["red cat"]) == pytest.approx(expected)


def test_a_repeated_word_is_clipped() -> None:
    # n = 1: min(2 L, L) * L / (2 L * L sqrt(2)); no bigram in common; equal lengths.
    assert first_score("red red", ["red cat"]) == pytest.approx(10 / 4 / (2 * math.sqrt(2)))


def test_references_are_averaged() -> None:
    assert first_score("red cat", ["red cat", "blue mat"]) == pytest.approx(5 / 2)


def test_rarer_words_weigh_more() -> None:
    # Four images; red with two of them, cat with one: weights log 2 and log 4 = 2 log 2.
    # n = 1: (2 log 2)**2 / (2 log 2 * log 2 * sqrt(5)); one word of difference.
    scores = cider(["cat", "", "", ""], [["red cat"], ["red"], ["dog"], ["mat"]])
    assert scores.per_item[0] == pytest.approx(10 / 4 * 2 / math.sqrt(5) * math.exp(-1 / 72))


def test_what_every_image_has_weighs_nothing() -> None:
    assert cider(["the", "the"], [["the"], ["the"]]) == (0, [0, 0])


def test_one_image_alone_scores_zero() -> None:
    assert cider(["red cat"], [["red cat"]]) == (0, [0])


def test_the_mean_is_over_images() -> None:
    scores = cider(["red cat", ""], [["red cat"], [OTHER]])
    assert scores.per_item == [pytest.approx(5), 0]
    assert scores.mean == pytest.approx(2.5)


@settings(deadline=None)
@given(CORPORA)
def test_scores_lie_between_zero_and_ten(corpus: list[tuple[str, list[str]]]) -> None:
    predictions, references = map(list, zip(*corpus, strict=True))
    scores = cider(predictions, references)
    assert all(0 <= score <= 10 + 1e-9 for score in scores.per_item)


@settings(deadline=None)
@given(CORPORA, st.integers(0, 99))
def test_order_of_the_images_does_not_matter(
    corpus: list[tuple[str, list[str]]], seed: int
) -> None:
    order = random.Random(seed).sample(range(len(corpus)), len(corpus))
    straight = cider(*map(list, zip(*corpus, strict=True)))
    shuffled = cider(*map(list, zip(*(corpus[index] for index in order), strict=True)))
    assert shuffled.per_item == pytest.approx([straight.per_item[index] for index in order])


@pytest.mark.parametrize(
    ("caption", "words"),
    [("A Red cat.", "a red cat"), ("It isn't the dog's!", "it is n't the dog 's"),
     ("red,blue", "red blue"), ("a t-shirt, 3.5 m", "a t-shirt 3.5 m"),
     ("1,000 at 10:30 in the U.S.", "1,000 at 10:30 in the u.s."), ("don’t", "do n't"),
     ("salt & pepper (50%)", "salt & pepper 50 %"), ("café - open", "café open"), ("...", "")],
)  # fmt: skip
def test_captions_become_words(caption: str, words: str) -> None:
    assert caption_words(caption) == words.split()


def test_another_tokeniser_may_be_given() -> None:
    scores = cider(["Red Cat", ""], [["red cat"], [OTHER]], tokenize=str.split)
    assert scores.per_item[0] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [([], [], "nothing to score"), (["x"], [], "1 predictions but 0 references"),
     (["x", "y"], [["x"], []], "references 1: there are none")],
)  # fmt: skip
def test_a_corpus_with_gaps_is_refused(predictions, references, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cider(predictions, references)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [([None], [["x"]], "prediction 0"), (["x"], ["x"], "references 0"),
     (["x"], [["x", 3]], "references 0")],
)  # fmt: skip
def test_what_is_no_string_is_refused(predictions, references, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cider(predictions, references)
