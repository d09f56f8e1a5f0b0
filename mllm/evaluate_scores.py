"""Predictions and their scores: files, problems by id, and scoring again without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm.tasks import Task, TaskItem, get_scorer
from mllm.tasks.records import Record, read_json, read_records
from mllm.versions import library_versions
from vision_moe import InputError, atomic_write_text, writable_folder

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"

_MAX_IDS = 100  # of a problem, in scores.json; predictions.jsonl tells all
_HALF = 0.5
PROBLEMS = {
    "no_answer": "no answer could be had (a picture that cannot be read, for one): scored as wrong",
    "empty": "the answer is empty",
    "unparsable": "the rules can make nothing of the answer",
    "unfinished": "the answer was cut off at the limit",
    "few_answers": "fewer human answers than the benchmark's",
    "unlabelled": "the truth is not known: not scored",
    "duplicate_id": "the id came again: only the first question was asked",
    "missing": "the answer file has no such id: scored as wrong",
    "unknown_id": "the answer file has an id that the benchmark does not",
    "answered_twice": "the answer file has the id again: the first answer counts",
}


@dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.jsonl``: all that scoring needs, and the score.

    Attributes:
        question_id: The question's.
        image: Key of its picture within the task's data.
        category: The question's.
        prompt: What was asked.
        text: What was answered.
        answer: The truth; empty where it is not known.
        correct: At least half of the full mark; ``None`` where nothing is right or wrong.
        score: ``None`` where the truth is not known.
        read: What the rules took the text for; ``None`` where they could make nothing of it.
        answers: All human answers, where there are several.
        options: Of a multiple choice, from A.
        finished: The model ended its answer by itself.
        fault: Why there is no answer.
    """

    question_id: str
    image: str | None
    category: str
    prompt: str
    text: str
    answer: str
    correct: bool | None = None
    score: float | None = None
    read: str | None = None
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    finished: bool = True
    fault: str | None = None

    @property
    def item(self) -> TaskItem:
        return TaskItem(
            self.question_id, self.image, self.prompt, self.answer, self.category,
            self.answers, self.options,
        )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """``scores.json`` and the lines of ``predictions.jsonl``."""

    scores: dict[str, Any]
    predictions: list[Prediction] = field(repr=False)

    def save(self, folder: str | Path) -> None:
        """Write both files; the scores come last, so that where they are, all is."""
        folder = writable_folder(folder)
        lines = [json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self.predictions]
        atomic_write_text(folder / PREDICTIONS, "".join(lines))
        scores = json.dumps(self.scores, indent=2, ensure_ascii=False) + "\n"
        atomic_write_text(folder / SCORES, scores)


def judge(
    task: Task,
    predictions: Sequence[Prediction],
    seed: int,
    more_problems: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[Prediction], dict[str, Any]]:
    """Score answers.

    Args:
        task: Whose rules hold.
        predictions: Their scores are not looked at.
        seed: Of the bootstrap intervals.
        more_problems: Ids with problems that answers do not show.

    Returns:
        The predictions with scores, and ``metrics``, ``intervals``, ``n``, ``n_scored`` and
        ``problems`` of ``scores.json``.
    """
    labelled = [p for p in predictions if p.item.is_labelled]
    scored: dict[str, Prediction] = {}
    values: list[float] = []
    if labelled:
        scores = task.scores([p.item for p in labelled], [p.text for p in labelled])
        for p, score in zip(labelled, scores, strict=True):
            value, read = (0.0, None) if p.fault is not None else score
            correct = None if task.graded else value >= _HALF
            scored[p.question_id] = replace(p, score=value, read=read, correct=correct)
            values.append(value)
    items = [p.item for p in labelled]
    judged = [
        scored.get(p.question_id, replace(p, score=None, read=None, correct=None))
        for p in predictions
    ]
    intervals = task.intervals(items, values, seed) if items else {}
    result = {
        "metrics": task.metrics(items, values) if items else {},
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "n": len(predictions),
        "n_scored": len(items),
        "problems": _problems(task, judged, more_problems or {}),
    }
    return judged, result


def _problems(
    task: Task, predictions: Sequence[Prediction], more: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    found: dict[str, list[str]] = {name: [] for name in PROBLEMS}
    for p in predictions:
        if p.fault is not None and p.question_id not in more.get("missing", ()):
            found["no_answer"].append(p.question_id)
        if p.fault is None and not p.text:
            found["empty"].append(p.question_id)
        if p.score is not None and p.read is None and p.text:
            found["unparsable"].append(p.question_id)
        if not p.finished:
            found["unfinished"].append(p.question_id)
        if 0 < len(p.answers) < task.num_human_answers:
            found["few_answers"].append(p.question_id)
        if not p.item.is_labelled:
            found["unlabelled"].append(p.question_id)
    for name, ids in more.items():
        found[name] += ids
    return {name: {"count": len(ids), "ids": ids[:_MAX_IDS]} for name, ids in found.items()}


def read_predictions(folder: str | Path) -> list[Prediction]:
    """The lines of a folder's ``predictions.jsonl``.

    Raises:
        InputError: There is none, or a line of it is damaged or comes again.
    """
    path = Path(folder) / PREDICTIONS
    if not path.is_file():
        raise InputError(f"'{folder}' holds no {PREDICTIONS}: it is not an evaluation's folder")
    seen: set[str] = set()
    predictions = []
    for record in read_records(path):
        one = _prediction(record)
        if one.question_id in seen:
            raise InputError(f"{record.where}: the question '{one.question_id}' comes again")
        seen.add(one.question_id)
        predictions.append(one)
    if not predictions:
        raise InputError(f"{path}: there is no prediction in it")
    return predictions


def _prediction(record: Record) -> Prediction:
    def text(key: str) -> str:
        value = record.values.get(key)
        if not isinstance(value, str):
            raise InputError(f"{record.where}: the field '{key}' is not a text")
        return value

    image, fault = record.values.get("image"), record.values.get("fault")
    return Prediction(
        question_id=text("question_id"),
        image=image if isinstance(image, str) else None,
        category=text("category"),
        prompt=text("prompt"),
        text=text("text"),
        answer=text("answer"),
        correct=record.values.get("correct") is True,
        score=_number(record.values.get("score")),
        answers=record.texts("answers"),
        options=record.texts("options"),
        finished=record.values.get("finished") is not False,
        fault=fault if isinstance(fault, str) else None,
    )


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]


def read_scores(folder: str | Path) -> dict[str, Any]:
    """A folder's ``scores.json``; empty where there is none."""
    path = Path(folder) / SCORES
    if not path.is_file():
        return {}
    scores = read_json(path)
    if not isinstance(scores, dict):
        raise InputError(f"{path}: not an object with named fields")
    return scores


def rescore(folder: str | Path, task_name: str | None = None) -> Evaluation:
    """Score a folder's predictions again, by today's rules; neither model nor data are needed.

    Args:
        folder: Of an evaluation; its ``scores.json`` says which task and seed.
        task_name: Needed where that file is lost.

    Raises:
        InputError: It is no such folder, or one of another task.
    """
    predictions = read_predictions(folder)
    old = read_scores(folder)
    name = old.get("task", task_name)
    if not isinstance(name, str):
        raise InputError(f"'{folder}' does not say which task it is of: name it with --task")
    if task_name not in (None, name):
        raise InputError(f"'{folder}' holds answers to '{name}', not to '{task_name}'")
    seed = old.get("seed", 0)
    kept = ("duplicate_id", "missing", "unknown_id", "answered_twice")
    old_problems = old.get("problems", {})
    more = {key: old_problems[key]["ids"] for key in kept if key in old_problems}
    judged, result = judge(get_scorer(name), predictions, seed, more)
    scores = {"task": name, **old, **result, "rescored_with": library_versions()}
    return Evaluation(scores, judged)


def scores_table(scores: dict[str, Any]) -> str:
    """The metrics with their intervals, and the problems, as lines of text."""
    head = f"{scores['task']}, {scores['n']} questions, seed {scores['seed']}"
    if scores.get("config", {}).get("blank_images"):
        head += ", blank pictures"
    lines = [head]
    percent = get_scorer(scores["task"]).percent
    width = max(map(len, scores["metrics"]), default=0)
    for name, value in scores["metrics"].items():
        line = f"  {name:<{width}}  " + (f"{100 * value:5.1f} %" if percent else f"{value:8.2f}")
        if name in scores["intervals"]:
            low, high = scores["intervals"][name]
            line += (
                f"   ({100 * low:.1f} to {100 * high:.1f})" if percent
                else f"   ({low:.2f} to {high:.2f})"
            )  # fmt: skip
        lines.append(line)
    if not scores["metrics"]:
        lines.append("  no question's truth is known: nothing is scored")
    for name, problem in scores["problems"].items():
        if problem["count"]:
            ids = ", ".join(problem["ids"][:5]) + ("" if problem["count"] <= 5 else ", ...")
            lines.append(f"  {problem['count']} x {PROBLEMS[name]} ({ids})")
    return "\n".join(lines)
