"""Properties of VQA accuracy, and what it refuses."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.scoring import (
    normalize_textvqa_answer,
    normalize_vqa_answer,
    textvqa_accuracy,
    vqa_accuracy,
)
from vision_moe import InputError

# Short texts of what the rules look at, so that they meet each other often.
TEXTS = st.lists(
    st.sampled_from(
        [*";/[]\"{}()=+\\_-><@`,?!.' \n\t\u00a0", "a", "The", "dont", "couldnt've", "two", "1", "0"]
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=8,
).map("".join)
ACCURACIES = pytest.mark.parametrize("accuracy", [vqa_accuracy, textvqa_accuracy])


@settings(deadline=None)
@given(TEXTS)
def test_normalisation_is_idempotent(text: str) -> None:
    normal = normalize_vqa_answer(text)
    assert normalize_vqa_answer(normal) == normal


@settings(deadline=None)
@given(TEXTS)
def test_normal_form_has_no_marks_capitals_or_outer_spaces(text: str) -> None:
    normal = normalize_vqa_answer(text)
    assert not set(normal) & set(';/[]"{}()=+\\_-><@`,?!\n\t')
    assert normal == normal.lower() == " ".join(normal.split())


@settings(deadline=None)
@given(TEXTS)
def test_normalisation_ignores_outer_white_space(text: str) -> None:
    assert normalize_vqa_answer(f"\n {text}\t") == normalize_vqa_answer(text)


@settings(deadline=None)
@given(TEXTS)
def test_textvqa_normal_form_is_lower_case_without_commas(text: str) -> None:
    normal = normalize_textvqa_answer(text)
    assert normal == normal.lower()
    assert "," not in normal


@ACCURACIES
@settings(deadline=None)
@given(prediction=TEXTS, answers=st.lists(TEXTS, min_size=1, max_size=12))
def test_accuracy_is_a_share(accuracy, prediction: str, answers: list[str]) -> None:
    assert 0 <= accuracy(prediction, answers) <= 1


@ACCURACIES
@settings(deadline=None)
@given(answers=st.lists(TEXTS, min_size=1, max_size=12), seed=st.integers(0, 99))
def test_order_of_the_humans_does_not_matter(accuracy, answers: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample(answers, len(answers))
    assert accuracy(answers[0], shuffled) == accuracy(answers[0], answers)


@ACCURACIES
@settings(deadline=None)
@given(answers=st.lists(TEXTS, min_size=1, max_size=12), index=st.integers(0, 11))
def test_one_more_agreeing_human_never_lowers_the_score(
    accuracy, answers: list[str], index: int
) -> None:
    agreeing = list(answers)
    agreeing[index % len(answers)] = "right"
    assert accuracy("right", agreeing) >= accuracy("right", answers)


@settings(deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=2, max_size=12))
def test_accuracy_is_the_mean_over_leave_one_out_subsets(
    prediction: str, answers: list[str]
) -> None:
    target = normalize_vqa_answer(prediction)
    subset_scores = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        matches = sum(normalize_vqa_answer(other) == target for other in others)
        subset_scores.append(min(matches / 3, 1))
    mean = sum(subset_scores) / len(subset_scores)
    assert vqa_accuracy(prediction, answers) == pytest.approx(mean, abs=1e-12)


@ACCURACIES
def test_no_human_answers_are_refused(accuracy) -> None:
    with pytest.raises(InputError, match="no human answer"):
        accuracy("yes", [])


@ACCURACIES
def test_one_string_for_the_answers_is_refused(accuracy) -> None:
    with pytest.raises(TypeError, match="not one string"):
        accuracy("yes", "yes")


@pytest.mark.parametrize("wrong", [None, 2, 2.5, b"yes", ["yes"], {"answer": "yes"}])
@ACCURACIES
def test_what_is_no_string_is_refused(accuracy, wrong) -> None:
    message = f"must be a string, not {type(wrong).__name__}"
    with pytest.raises(TypeError, match=f"prediction {message}"):
        accuracy(wrong, ["yes"])
    with pytest.raises(TypeError, match=f"every human answer {message}"):
        accuracy("yes", ["yes", wrong])


@pytest.mark.parametrize("normalize", [normalize_vqa_answer, normalize_textvqa_answer])
def test_only_strings_are_normalised(normalize) -> None:
    with pytest.raises(TypeError, match="not NoneType"):
        normalize(None)
