"""The evaluation tasks and their data."""

from __future__ import annotations

import json

import pytest

from mllm.easy_vqa import EasyVQA
from mllm.scoring import exact_match, normalize_answer
from mllm.tasks import get_task
from vision_moe import InputError

BUILT_IN = ["easy_vqa", "scenes", "scenes_compositional"]


@pytest.fixture(scope="module")
def easy_vqa():
    return get_task("easy_vqa")


@pytest.mark.parametrize(
    ("text", "normal"),
    [(" Yes.", "yes"), ("Dark  Red", "dark red"), ("upper left!", "upper left"), ("", ""),
     ("two\n", "two"), ("3.5", "3.5")],
)  # fmt: skip
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_ignores_case_and_full_stop():
    assert exact_match("Red.", "red")
    assert not exact_match("red circle", "red")


def test_easy_vqa_has_its_published_size():
    assert len(EasyVQA("train").questions) == 38575
    assert len(EasyVQA("test").questions) == 9673


def test_easy_vqa_pictures_are_there(easy_vqa):
    assert easy_vqa.open_image("0").size == (64, 64)


def test_easy_vqa_has_three_categories(easy_vqa):
    assert {item.category for item in easy_vqa.all_items(0)} == {"shape", "color", "yes-no"}


def test_easy_vqa_refuses_an_unknown_split():
    with pytest.raises(InputError, match="no split 'val'"):
        EasyVQA("val")


def test_missing_data_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        get_task("easy_vqa", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "fault"),
    [("{", "not JSON"), (json.dumps([["q", "a", 1], ["q", 2, 3]]), "record 1")],
)
def test_damaged_data_file_is_told(tmp_path, content, fault):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "questions.json").write_text(content)
    with pytest.raises(InputError, match=fault):
        get_task("easy_vqa", str(tmp_path))


@pytest.mark.parametrize("name", BUILT_IN)
def test_draw_depends_on_the_seed_alone(name):
    assert get_task(name).load(20, seed=3) == get_task(name).load(20, seed=3)


@pytest.mark.parametrize("name", BUILT_IN)
def test_draw_differs_between_seeds(name):
    assert get_task(name).load(20, seed=3) != get_task(name).load(20, seed=4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_drawn_questions_have_pictures(name):
    task = get_task(name)
    assert task.name == name
    for item in task.load(3):
        assert task.open_image(item.image_key).mode == "RGB"


def test_draw_has_no_question_twice(easy_vqa):
    ids = [item.question_id for item in easy_vqa.load(2000)]
    assert len(set(ids)) == 2000


def test_thousand_questions_by_default(easy_vqa):
    assert len(easy_vqa.load()) == 1000


@pytest.mark.parametrize("wanted", [0, -1, 9674])
def test_impossible_number_of_questions_is_told(easy_vqa, wanted):
    with pytest.raises(InputError, match=f"{wanted} questions wanted, from 1 to 9673"):
        easy_vqa.load(wanted)


def test_accuracy_is_counted_by_category(easy_vqa):
    items = easy_vqa.load(200)
    correct = [item.category != "shape" for item in items]
    metrics = easy_vqa.metrics(items, correct)
    assert metrics["accuracy_shape"] == 0
    assert metrics["accuracy_color"] == metrics["accuracy_yes-no"] == 1
    assert metrics["accuracy"] == sum(correct) / 200


@pytest.mark.parametrize(("typed", "nearest"), [("easyvqa", "easy_vqa"), ("scene", "scenes")])
def test_unknown_task_names_the_nearest(typed, nearest):
    with pytest.raises(InputError, match=f"did you mean '{nearest}'"):
        get_task(typed)


def test_generated_task_takes_no_data():
    with pytest.raises(InputError, match="takes no --data"):
        get_task("scenes", "somewhere")
