"""scores.json and predictions.jsonl."""

from __future__ import annotations

import json

import pytest

from mllm.evaluate import EvaluationConfig, evaluate_checkpoint, evaluate_model, scores_table
from mllm.tasks import get_task
from vision_moe import InputError


@pytest.fixture
def evaluation(mllm):
    config = EvaluationConfig(num_questions=6, seed=1)
    return evaluate_model(*mllm, get_task("easy_vqa"), config, "somewhere", progress=False)


def test_scores_have_the_documented_fields(evaluation):
    fields = {"task", "metrics", "n", "checkpoint", "prompt", "seed", "versions", "config"}
    assert set(evaluation.scores) == fields


def test_accuracy_is_that_of_the_predictions(evaluation):
    share = sum(p.correct for p in evaluation.predictions) / 6
    assert evaluation.scores["metrics"]["accuracy"] == share


def test_perfect_answers_score_one(mllm, monkeypatch):
    import mllm.evaluate as module

    task = get_task("easy_vqa")
    answers = [item.answer.upper() + "." for item in task.load(6)]
    monkeypatch.setattr(module, "generate_answers", lambda *_args, **_kwargs: answers)
    evaluation = evaluate_model(*mllm, task, EvaluationConfig(num_questions=6))
    assert evaluation.scores["metrics"]["accuracy"] == 1


def test_blank_pictures_answer_a_question_the_same(mllm):
    config = EvaluationConfig(num_questions=300, blank_images=True)
    evaluation = evaluate_model(*mllm, get_task("easy_vqa"), config, progress=False)
    answers: dict[str, set[str]] = {}
    for prediction in evaluation.predictions:
        answers.setdefault(prediction.prompt, set()).add(prediction.text)
    assert max(map(len, answers.values())) == 1


def test_files_hold_the_evaluation(mllm_folder, tmp_path):
    out = tmp_path / "out" / "scores"
    evaluation = evaluate_checkpoint(
        mllm_folder, "scenes", EvaluationConfig(num_questions=5), out=out
    )
    assert json.loads((out / "scores.json").read_text()) == evaluation.scores
    lines = (out / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [
        prediction.question_id for prediction in evaluation.predictions
    ]
    assert sorted(p.name for p in out.iterdir()) == ["predictions.jsonl", "scores.json"]


def test_evaluation_is_repeatable(mllm_folder):
    runs = [
        evaluate_checkpoint(mllm_folder, "scenes", EvaluationConfig(num_questions=5))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_table_shows_percentages(evaluation):
    table = scores_table(evaluation.scores)
    assert table.startswith("easy_vqa, 6 questions, seed 1\n")
    assert f"{100 * evaluation.scores['metrics']['accuracy']:.1f} %" in table


def test_batch_size_below_one_is_told():
    with pytest.raises(InputError, match="batch size is 0"):
        EvaluationConfig(batch_size=0)
