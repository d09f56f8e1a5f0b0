"""POPE, MME, MMBench, ScienceQA, GQA and SEED: the sums, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.scoring import (
    MME_COGNITION,
    MME_PERCEPTION,
    gqa_correct,
    mmbench_circular,
    mmbench_option,
    mme_answer,
    mme_scores,
    pope_answer,
    pope_metrics,
    pope_scores,
    scienceqa_accuracy,
    scienceqa_option,
    seed_correct,
)
from vision_moe import InputError

YES_NO = st.sampled_from(["yes", "no"])


def test_pope_counts_yes_as_positive() -> None:
    # Two true positives, one false positive, one false negative, four true negatives.
    answers = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    labels = ["yes", "yes", "no", "yes", "no", "no", "no", "no"]
    assert pope_metrics(answers, labels) == {
        "accuracy": 6 / 8,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": 2 / 3,
        "yes_share": 3 / 8,
    }


def test_pope_f1_is_the_harmonic_mean() -> None:
    metrics = pope_metrics(["yes", "yes", "yes", "no"], ["yes", "no", "no", "no"])
    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == (1 / 3, 1, 1 / 2)


@pytest.mark.parametrize(("answer", "label"), [("no", "no"), ("no", "yes"), ("yes", "no")])
def test_pope_without_true_positives_divides_by_nothing(answer: str, label: str) -> None:
    metrics = pope_metrics([answer], [label])
    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == (0, 0, 0)


@settings(deadline=None)
@given(st.lists(st.tuples(YES_NO, YES_NO), min_size=1))
def test_pope_metrics_are_shares(pairs: list[tuple[str, str]]) -> None:
    answers, labels = zip(*pairs, strict=True)
    assert all(0 <= value <= 1 for value in pope_metrics(answers, labels).values())


def test_pope_mean_f1_weighs_categories_equally() -> None:
    scores = pope_scores(
        ["yes", "yes", "no", "no"], ["yes", "yes", "no", "yes"], ["random"] * 3 + ["popular"]
    )
    assert scores["f1_random"] == 1
    assert scores["f1_popular"] == 0
    assert scores["mean_f1"] == 0.5


def test_pope_refuses_other_words_than_yes_and_no() -> None:
    with pytest.raises(InputError, match="answer is 'Yes', neither"):
        pope_metrics(["Yes"], ["yes"])
    with pytest.raises(InputError, match="label is '1', neither"):
        pope_metrics(["yes"], ["1"])


def test_mme_adds_accuracy_and_accuracy_plus() -> None:
    # Four images: both right, one right, both right, none: 5 of 8 and 2 of 4.
    correct = [True, True, True, False, True, True, False, False]
    images = ["1", "1", "2", "2", "3", "3", "4", "4"]
    scores = mme_scores(["count"] * 8, images, correct)
    assert scores == {"count": 62.5 + 50, "perception": 112.5}


def test_mme_pairs_by_image_and_not_by_order() -> None:
    scores = mme_scores(["OCR"] * 4, ["1", "2", "1", "2"], [True, False, True, False])
    assert scores["OCR"] == 50 + 50


def test_mme_keeps_images_of_two_categories_apart() -> None:
    scores = mme_scores(["color", "color", "count", "count"], ["1"] * 4, [True, True, False, True])
    assert (scores["color"], scores["count"], scores["perception"]) == (200, 50, 250)


def test_mme_ends_at_2000_and_800() -> None:
    categories = [name for name in MME_PERCEPTION + MME_COGNITION for _ in range(2)]
    scores = mme_scores(categories, ["1"] * len(categories), [True] * len(categories))
    assert (scores["perception"], scores["cognition"]) == (2000, 800)


@pytest.mark.parametrize("count", [1, 3])
def test_mme_refuses_an_image_without_two_questions(count: int) -> None:
    with pytest.raises(InputError, match=f"'scene', image '7.jpg': {count} answered questions"):
        mme_scores(["scene"] * count, ["7.jpg"] * count, [True] * count)


def test_mme_refuses_a_category_of_another_benchmark() -> None:
    with pytest.raises(InputError, match="no category 'adversarial'"):
        mme_scores(["adversarial"], ["1"], [True])


def test_mmbench_needs_every_rotation() -> None:
    indices = [7, 1_000_007, 2_000_007, 8, 1_000_008]
    assert mmbench_circular(indices, [True, True, False, True, True]) == {7: False, 8: True}


def test_mmbench_wrong_in_the_first_rotation_stays_wrong() -> None:
    assert mmbench_circular([7, 1_000_007], [False, True]) == {7: False}


def test_mmbench_refuses_an_index_twice() -> None:
    with pytest.raises(InputError, match="index 7 is answered twice"):
        mmbench_circular([7, 7], [True, True])


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.text(max_size=5), min_size=1, max_size=5))
def test_mmbench_option_is_one_of_the_letters_or_none(text: str, options: list[str]) -> None:
    assert mmbench_option(text, options) in (*"ABCDE"[: len(options)], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "no options"), ([], "no options"), ({"a": "x"}, "named 'a'"), ({"AB": "x"}, "named 'AB'"),
     (["x"] * 27, "27 options")],
)  # fmt: skip
def test_mmbench_refuses_impossible_options(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mmbench_option("A", options)


@pytest.mark.parametrize("options", ["cat", {"A": None}, ["cat", 3]])
def test_mmbench_refuses_options_that_are_no_strings(options) -> None:
    with pytest.raises(TypeError, match="string"):
        mmbench_option("A", options)


def test_scienceqa_reports_all_and_image_only() -> None:
    accuracy = scienceqa_accuracy([True, False, True, True], [True, True, False, False])
    assert accuracy == {"accuracy": 0.75, "accuracy_image": 0.5}


def test_scienceqa_without_images_has_no_image_accuracy() -> None:
    assert scienceqa_accuracy([True, False], [False, False]) == {"accuracy": 0.5}


@pytest.mark.parametrize("num_choices", [0, -1, 27])
def test_scienceqa_refuses_an_impossible_number_of_choices(num_choices: int) -> None:
    with pytest.raises(InputError, match=f"with {num_choices} choices"):
        scienceqa_option("A", num_choices)


@settings(deadline=None)
@given(st.text(max_size=30), st.integers(1, 26))
def test_scienceqa_option_is_within_the_choices(text: str, num_choices: int) -> None:
    letter = scienceqa_option(f"The answer is {text}.", num_choices)
    assert letter is None or 0 <= ord(letter) - ord("A") < num_choices


@settings(deadline=None)
@given(st.text(max_size=30))
def test_pope_and_mme_know_no_third_word(text: str) -> None:
    assert pope_answer(text) in ("yes", "no")
    assert mme_answer(text) in ("yes", "no", None)


@pytest.mark.parametrize(
    "score",
    [pope_answer, mme_answer, lambda text: mmbench_option(text, ["x"]),
     lambda text: scienceqa_option(text, 2), lambda text: gqa_correct(text, "x"),
     lambda text: gqa_correct("x", text), lambda text: seed_correct(text, "A"),
     lambda text: seed_correct("A", text)],
)  # fmt: skip
@pytest.mark.parametrize("wrong", [None, 1, b"A"])
def test_what_is_no_string_is_refused(score, wrong) -> None:
    with pytest.raises(TypeError, match="must be a string, not"):
        score(wrong)


@pytest.mark.parametrize(
    ("aggregate", "num_arguments"),
    [(pope_metrics, 2), (pope_scores, 3), (mme_scores, 3), (mmbench_circular, 2),
     (scienceqa_accuracy, 2)],
)  # fmt: skip
def test_nothing_to_score_and_unequal_lengths_are_refused(aggregate, num_arguments: int) -> None:
    with pytest.raises(InputError, match="nothing to score"):
        aggregate(*[[]] * num_arguments)
    with pytest.raises(InputError, match="2 .* but .*1 "):
        aggregate([True, True], *[[True]] * (num_arguments - 1))
