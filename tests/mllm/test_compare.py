"""Paired comparison: numbers worked out by hand, files, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mllm import cli
from mllm.compare import compare, compare_checkpoints, comparison_table
from mllm.evaluate import EvaluationConfig, evaluate_checkpoint
from mllm.evaluate_scores import Evaluation, Prediction, judge
from mllm.tasks import get_task
from vision_moe import InputError

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def task():
    return get_task("easy_vqa")


@pytest.fixture(scope="module")
def truth(task):
    """Right answers to 40 questions."""
    return [
        Prediction(one.question_id, one.image_key, one.category, one.question, one.answer,
                   one.answer)
        for one in task.load(40)
    ]  # fmt: skip


def wrong_at(truth, numbers):
    return [
        replace(one, text=HOSTILE) if number in numbers else one
        for number, one in enumerate(truth)
    ]


def test_difference_is_that_of_the_accuracies(task, truth):
    found = compare(task, ("a", "b"), wrong_at(truth, range(10)), wrong_at(truth, {0, 39}))
    overall = found.differences[0]
    assert (overall.metric, overall.n) == ("accuracy", 40)
    assert (overall.a, overall.b) == (30 / 40, 38 / 40)
    assert overall.difference == pytest.approx(0.2)
    assert overall.low < 0.2 < overall.high


def test_mcnemar_counts_the_questions_that_one_alone_answers(task, truth):
    found = compare(task, ("a", "b"), wrong_at(truth, range(10)), wrong_at(truth, {0, 39}))
    overall = found.differences[0]
    assert (overall.only_a, overall.only_b) == (1, 9)
    # Ten coins, at most one on one side, either way: 2 (1 + 10) / 2^10.
    assert overall.p_value == pytest.approx(22 / 1024)


def test_same_answers_differ_by_nothing(task, truth):
    found = compare(task, ("a", "b"), wrong_at(truth, {3}), wrong_at(truth, {3}))
    overall = found.differences[0]
    assert (overall.difference, overall.low, overall.high, overall.p_value) == (0, 0, 0, 1)
    assert found.differing() == []


def test_categories_are_compared_apart(task, truth):
    shapes = {number for number, one in enumerate(truth) if one.category == "shape"}
    found = compare(task, ("a", "b"), wrong_at(truth, shapes), truth)
    by_name = {each.metric: each.difference for each in found.differences}
    assert by_name["accuracy_shape"] == 1
    assert by_name["accuracy_color"] == 0


def test_questions_are_paired_by_id_and_not_by_line(task, truth):
    found = compare(task, ("a", "b"), truth, truth[5:][::-1])
    assert found.differences[0].difference == 0
    assert (len(found.pairs), found.num_unpaired) == (35, 5)


def test_nothing_in_common_is_told(task, truth):
    with pytest.raises(InputError, match="no scored question in common"):
        compare(task, ("a", "b"), truth[:5], truth[5:])


def test_other_question_of_the_same_id_is_told(task, truth):
    other = [replace(truth[0], prompt="what else?"), *truth[1:]]
    with pytest.raises(InputError, match=f"question '{truth[0].question_id}' is not the same"):
        compare(task, ("a", "b"), truth, other)


@pytest.fixture
def folders(task, truth, tmp_path):
    """Two evaluations, the first with ten mistakes."""
    found = []
    for name, numbers in (("dense", range(10)), ("moe", {0, 39})):
        judged, result = judge(task, wrong_at(truth, numbers), 0)
        Evaluation({"task": "easy_vqa", "seed": 0, **result}, judged).save(tmp_path / name)
        found.append(str(tmp_path / name))
    return found


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_page_shows_every_picture_on_which_they_differ_and_fetches_nothing(folders, tmp_path):
    compare_checkpoints(folders, "easy_vqa", out=tmp_path / "out")
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert page.tags.count("li") == 10
    assert page.tags.count("img") == 11  # and the plot
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags


def test_files_hold_the_comparison(folders, tmp_path):
    compare_checkpoints(folders, "easy_vqa", out=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    (one,) = content["comparisons"]
    assert (one["a"], one["b"], one["n"]) == ("dense", "moe", 40)
    assert one["differences"][0]["difference"] == pytest.approx(0.2)
    assert len(one["differing_questions"]) == 10
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_a_line_for_each_metric(task, folders, tmp_path):
    comparisons = compare_checkpoints(folders, "easy_vqa", out=tmp_path / "out")
    lines = comparison_table(task, comparisons).splitlines()
    assert lines[0] == "easy_vqa, 40 questions: moe (B) against dense (A)"
    assert "+20.0" in lines[2] and "0.021" in lines[2]
    assert len(lines) == 2 + len(comparisons[0].differences)


def test_checkpoints_are_asked_first(mllm_folder: Path, folders, tmp_path):
    config = EvaluationConfig(num_questions=40)
    found = compare_checkpoints(
        [str(mllm_folder), folders[1]], "easy_vqa", config, out=tmp_path / "out"
    )
    assert len(found[0].pairs) == 40
    assert (tmp_path / "out" / mllm_folder.name / "scores.json").is_file()


def test_captions_have_no_mcnemar_test(mllm_folder: Path, tmp_path):
    data = str(Path(__file__).parent / "benchmarks" / "coco_caption")
    first = evaluate_checkpoint(mllm_folder, "coco_caption", data=data, out=tmp_path / "a")
    better = [replace(one, text=one.answers[0]) for one in first.predictions]
    Evaluation(first.scores, better).save(tmp_path / "b")
    sources = [str(tmp_path / "a"), str(tmp_path / "b")]
    (found,) = compare_checkpoints(sources, "coco_caption", data=data, out=tmp_path / "out")
    assert found.differences[0].difference > 1
    assert found.differences[0].p_value is None


@pytest.mark.parametrize("num", [1, 2])
def test_one_alone_and_twice_the_same_are_told(folders, tmp_path, num):
    with pytest.raises(InputError, match="at least two|named twice"):
        compare_checkpoints([folders[0]] * num, "easy_vqa", out=tmp_path / "out")


def test_evaluation_of_another_task_is_told(folders, tmp_path):
    with pytest.raises(InputError, match="holds answers to 'easy_vqa', not to 'scenes'"):
        compare_checkpoints(folders, "scenes", out=tmp_path / "out")


def test_command_prints_the_table(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["compare", *folders, "--task", "easy_vqa", "--out", str(tmp_path / "out")])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("easy_vqa, 40 questions")
