"""scores.json and predictions.jsonl."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mllm.evaluate import (
    EvaluationConfig,
    evaluate_answers,
    evaluate_checkpoint,
    evaluate_model,
    rescore,
    scores_table,
)
from mllm.evaluate_submission import write_submission
from mllm.generation import Answer, Answerer
from mllm.tasks import get_task
from vision_moe import InputError


@pytest.fixture
def evaluation(mllm):
    config = EvaluationConfig(num_questions=6, seed=1)
    return evaluate_model(*mllm, get_task("easy_vqa"), config, "somewhere", progress=False)


def test_scores_have_the_documented_fields(evaluation):
    fields = {"task", "metrics", "n", "checkpoint", "prompt", "seed", "versions", "config",
              "checkpoint_sha256", "intervals", "n_scored", "problems"}  # fmt: skip
    assert set(evaluation.scores) == fields


def test_accuracy_is_that_of_the_predictions(evaluation):
    share = sum(p.correct for p in evaluation.predictions) / 6
    assert evaluation.scores["metrics"]["accuracy"] == share


def test_perfect_answers_score_one(mllm, monkeypatch):
    task = get_task("easy_vqa")
    truth = {
        (item.image_key, item.question): item.answer.upper() + "." for item in task.load(6)
    }

    def answer(self, requests, open_image):
        return ((one, Answer(truth[one.image_key, one.question])) for one in requests)

    monkeypatch.setattr(Answerer, "answer", answer)
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


BENCHMARKS = Path(__file__).parent / "benchmarks"
SIX = EvaluationConfig(num_questions=6)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def count_answers(monkeypatch, stop_after=None):
    """Requests that a model is asked, in all; it is interrupted after some."""
    asked = []
    original = Answerer.answer

    def counting(self, requests, open_image):
        asked.extend(requests)
        for number, pair in enumerate(original(self, requests, open_image)):
            if number == stop_after:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(Answerer, "answer", counting)
    return asked


def test_interrupted_evaluation_goes_on_where_it_stopped(mllm_folder, tmp_path, monkeypatch):
    whole = evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        count_answers(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path / "out")
    assert not (tmp_path / "out" / "scores.json").exists()
    asked = count_answers(monkeypatch)
    again = evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path / "out")
    assert len(asked) == 2
    assert again == whole
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["predictions.jsonl", "scores.json"]


def test_answer_that_was_cut_off_in_its_file_is_given_again(mllm_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count_answers(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path)
    (log,) = tmp_path.glob("*.partial.jsonl")
    log.write_bytes(log.read_bytes()[:-9])
    asked = count_answers(monkeypatch)
    evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path)
    assert len(asked) == 3


def test_answers_of_another_configuration_are_not_taken_over(mllm_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count_answers(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path)
    asked = count_answers(monkeypatch)
    other = EvaluationConfig(num_questions=6, bf16=True)
    evaluate_checkpoint(mllm_folder, "easy_vqa", other, out=tmp_path)
    assert len(asked) == 6


def test_two_processes_give_the_answers_of_one(mllm_folder, tmp_path, monkeypatch):
    one = evaluate_checkpoint(mllm_folder, "easy_vqa", SIX)
    asked = count_answers(monkeypatch)
    shared = EvaluationConfig(num_questions=6, processes=2)
    two = evaluate_checkpoint(mllm_folder, "easy_vqa", shared, out=tmp_path)
    assert two.predictions == one.predictions
    assert 0 < len(asked) < 6


def test_hash_is_that_of_the_weights(mllm_folder, tmp_path):
    def evaluate():
        config = EvaluationConfig(num_questions=1)
        return evaluate_checkpoint(mllm_folder, "easy_vqa", config).scores["checkpoint_sha256"]

    before = evaluate()
    (mllm_folder / "training_log.json").write_text("{}")
    assert evaluate() == before
    generation = mllm_folder / "generation_config.json"
    generation.write_text(generation.read_text() + " ")
    assert evaluate() != before


def test_rescoring_needs_no_model_and_gives_the_same(mllm_folder, tmp_path):
    evaluation = evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path)
    again = rescore(tmp_path)
    assert again.predictions == evaluation.predictions
    rescored = dict(again.scores)
    assert rescored.pop("rescored_with") == evaluation.scores["versions"]
    assert rescored == evaluation.scores


def test_rescoring_follows_the_predictions(mllm_folder, tmp_path):
    evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path)
    lines = lines_of(tmp_path / "predictions.jsonl")
    right = [{**line, "text": line["answer"]} for line in lines]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, right)))
    assert rescore(tmp_path).scores["metrics"]["accuracy"] == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda lines: [*lines, lines[0]], "comes again"),
        (lambda lines: [{**lines[0], "text": None}], "record 0: the field 'text' is not a text"),
        (lambda lines: [], "no prediction"),
    ],
)
def test_damaged_predictions_are_told_by_record(mllm_folder, tmp_path, change, fault):
    evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path)
    lines = change(lines_of(tmp_path / "predictions.jsonl"))
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=fault):
        rescore(tmp_path)


def test_predictions_of_another_task_are_told(mllm_folder, tmp_path):
    evaluate_checkpoint(mllm_folder, "easy_vqa", SIX, out=tmp_path)
    with pytest.raises(InputError, match="holds answers to 'easy_vqa', not to 'pope'"):
        rescore(tmp_path, "pope")


@pytest.mark.parametrize("name", ["mmbench", "scienceqa", "coco_caption"])
def test_benchmark_is_evaluated_end_to_end(mllm_folder, tmp_path, name):
    data = str(BENCHMARKS / name)
    evaluation = evaluate_checkpoint(mllm_folder, name, data=data, out=tmp_path)
    assert evaluation.scores["metrics"].keys() == evaluation.scores["intervals"].keys()
    assert rescore(tmp_path).scores["metrics"] == evaluation.scores["metrics"]
    assert scores_table(evaluation.scores).startswith(f"{name}, ")


def test_likeliest_options_are_letters(mllm_folder):
    config = EvaluationConfig(answer_by="likelihood")
    evaluation = evaluate_checkpoint(mllm_folder, "seed", config, str(BENCHMARKS / "seed"))
    assert {p.text for p in evaluation.predictions} <= set("ABCD")


def test_open_questions_cannot_be_answered_by_likelihood(mllm_folder):
    config = EvaluationConfig(answer_by="likelihood")
    with pytest.raises(InputError, match="'gqa', question '201': it has no choices"):
        evaluate_checkpoint(mllm_folder, "gqa", config, str(BENCHMARKS / "gqa"))


def test_unreadable_picture_is_wrong_and_told_by_id(mllm_folder, tmp_path):
    data = tmp_path / "pope"
    shutil.copytree(BENCHMARKS / "pope", data)
    next(data.glob("val2014/*.jpg")).write_bytes(b"rubbish")
    evaluation = evaluate_checkpoint(mllm_folder, "pope", data=str(data), out=tmp_path / "out")
    assert evaluation.scores["problems"]["no_answer"]["count"] == 6
    assert evaluation.scores["metrics"]["accuracy"] == 0
    assert "not an image" in lines_of(tmp_path / "out" / "predictions.jsonl")[0]["fault"]
    assert "6 x no answer could be had" in scores_table(evaluation.scores)


def test_answers_that_never_stop_are_counted(mllm, tmp_path):
    model, processor = mllm
    model.lm_head.bias = None
    with_end = model.generation_config.eos_token_id
    model.lm_head.weight.data[with_end] = 0  # tied: the end of turn is never likeliest
    evaluation = evaluate_model(model, processor, get_task("easy_vqa"), SIX, progress=False)
    unfinished = evaluation.scores["problems"]["unfinished"]["count"]
    assert unfinished == sum(not p.finished for p in evaluation.predictions) > 0


def answer_file(tmp_path, answers):
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps({"question_id": key, "text": text}) for key, text in answers]
    path.write_text("\n".join(lines))
    return path


def test_answers_of_another_program_are_scored(tmp_path):
    path = answer_file(tmp_path, [("201", "No"), ("202", "blue.")])
    evaluation = evaluate_answers(path, "gqa", data=str(BENCHMARKS / "gqa"))
    assert evaluation.scores["metrics"]["accuracy"] == 1


def test_missing_unknown_and_repeated_ids_are_told(tmp_path):
    path = answer_file(tmp_path, [("201", "no"), ("201", "yes"), ("7", "no")])
    scores = evaluate_answers(path, "gqa", data=str(BENCHMARKS / "gqa")).scores
    problems = {key: one["ids"] for key, one in scores["problems"].items() if one["count"]}
    assert problems == {"missing": ["202"], "unknown_id": ["7"], "answered_twice": ["201"]}
    assert scores["metrics"]["accuracy"] == 0.5


def test_answers_to_another_benchmark_are_told(tmp_path):
    path = answer_file(tmp_path, [("1", "no"), ("2", "yes")])
    with pytest.raises(InputError, match="none of its 2 question ids is one of task 'gqa'"):
        evaluate_answers(path, "gqa", data=str(BENCHMARKS / "gqa"))


def test_submission_is_json(mllm_folder, tmp_path):
    data = str(BENCHMARKS / "vizwiz")
    evaluation = evaluate_checkpoint(mllm_folder, "vizwiz", data=data, out=tmp_path)
    rows = json.loads(write_submission(evaluation, tmp_path, data).read_text())
    assert rows[0]["image"] == "VizWiz_val_00000000.jpg"


def test_submission_sheet_holds_texts_and_no_formulas(mllm_folder, tmp_path, monkeypatch):
    openpyxl = pytest.importorskip("openpyxl", reason="the extra 'eval' is not installed")
    answer = "=1+1\x00"
    monkeypatch.setattr(
        Answerer, "answer", lambda self, asked, _: ((one, Answer(answer)) for one in asked)
    )
    data = str(BENCHMARKS / "mmbench")
    evaluation = evaluate_checkpoint(mllm_folder, "mmbench", data=data, out=tmp_path)
    sheet = openpyxl.load_workbook(write_submission(evaluation, tmp_path, data)).active
    cells = [cell.value for cell in sheet[2]]
    assert cells[0] == 241 and cells[-1] == "=1+1"
    assert sheet[2][6].data_type == "s"
