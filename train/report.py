"""The quickstart's report: one HTML file that needs nothing else, for someone new to all of this.

Figures come from the folder that the quickstart wrote; pictures from the evaluation's own data.
"""

import base64
import io
import json
import random
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mllm.inspection import BlockRouting, Inspection, inspect_checkpoint
from mllm.tasks import Task, get_task
from train.plots import bars, loss_curve
from vision_moe import InputError, atomic_write_text

TEMPLATE = "report.html.j2"
REPORT_FILE = "report.html"

#: Share of all test questions that the answer most frequent in training, to the same words, gets
#: right, where it is known.
WORDS_ALONE = {"easy_vqa": 0.670}

#: Pictures that are shown: drawn from all questions, and from those answered wrongly.
NUM_EXAMPLES, NUM_MISTAKES = 12, 4

_SECONDS_LABELS = {
    "base_clip": "base CLIP",
    "upcycle": "upcycling (DMU)",
    "pretrain": "connector pretraining",
    "finetune": "instruction tuning",
    "eval": "evaluation",
}
_TASK_LABELS = {"easy_vqa": "easy-VQA", "scenes": "Scenes"}
_RECIPES = {
    "Base CLIP": "clip",
    "Upcycling": "clip_moe",
    "Connector pretraining": "pretrain",
    "Instruction tuning": "mllm",
}


@dataclass(frozen=True)
class LossCurve:
    """A stage's training in one picture; ``first`` and ``last`` are logged losses."""

    title: str
    steps: int
    first: float
    last: float
    svg: Markup


@dataclass(frozen=True)
class TaskResult:
    """Scores of a task by category; ``blank`` is the same without pictures, where it was run."""

    name: str
    label: str
    num_questions: int
    accuracy: float
    blank: float | None
    words_alone: float | None
    svg: Markup


@dataclass(frozen=True)
class Example:
    """A test picture with a question; ``picture`` is a data URI."""

    task: str
    picture: str
    question: str
    text: str
    answer: str
    correct: bool


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write ``out/report.html``.

    Args:
        out: The folder that ``mllm quickstart`` writes, with every stage and evaluation whole.
        report: What ``out/report.json`` says.

    Raises:
        InputError: A file of the folder is missing or damaged.
    """
    inspection = inspect_checkpoint(out / "clip_moe", seed=report["seed"])
    retrieval = _read_json(out / "eval" / "retrieval.json")
    examples, mistakes = draw_examples(out, report["seed"])
    curves = _loss_curves(out)
    page = _template().render(
        report=report,
        curves=curves,
        num_stages=len(curves) - 4,  # beside those of base, routers, connector and instructions
        seconds_svg=_seconds_bars(report["seconds"]),
        words_alone=WORDS_ALONE["easy_vqa"],
        tasks=[_task_result(out, name) for name in _evaluated_tasks(out)],
        retrieval=retrieval,
        retrieval_svg=_retrieval_bars(retrieval),
        factors_svg=_factor_bars(retrieval),
        inspection=inspection,
        towers=_routing_by_tower(inspection),
        examples=examples,
        mistakes=mistakes,
        recipes=_recipes(out),
        shell_paths={name: shlex.quote(str(out / name)) for name in ("clip_moe", "mllm")},
        python_path=repr(str(out / "mllm")),
    )
    atomic_write_text(out / REPORT_FILE, page)


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, duration=duration)
    return environment.get_template(TEMPLATE)


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"  # the sign stays on the number's line


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 05 s``, ``2 h 04 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _loss_curves(out: Path) -> list[LossCurve]:
    upcycling = _read_json(out / "clip_moe" / "training_log.json")
    # The routers' log repeats those of the stages, whose own folder may have been tidied away.
    logs = [("Base CLIP", _read_json(out / "clip" / "training_log.json"))]
    logs += [(f"DMU stage {n}", log) for n, log in enumerate(upcycling["stages"], start=1)]
    logs += [("Router tuning", upcycling)]
    logs += [
        ("Connector pretraining", _read_json(out / "pretrain" / "training_log.json")),
        ("Instruction tuning", _read_json(out / "mllm" / "training_log.json")),
    ]
    return [_loss_curve(n, title, log["history"]) for n, (title, log) in enumerate(logs)]


def _loss_curve(number: int, title: str, history: Sequence[dict[str, float]]) -> LossCurve:
    steps, losses = ([entry[key] for entry in history] for key in ("step", "loss"))
    svg = loss_curve(f"loss-{number}", title, steps, losses)
    return LossCurve(title, int(steps[-1]), losses[0], losses[-1], svg)


def _seconds_bars(seconds: dict[str, float]) -> Markup:
    stages = {key: value for key, value in seconds.items() if key != "total"}
    return bars(
        "seconds",
        "Time of each stage",
        [_SECONDS_LABELS.get(key, key.replace("_", " ")) for key in stages],
        {"time": list(stages.values())},
        text=duration,
        limit=1.2 * max(stages.values()),  # "12 min 05 s" is longer than a percentage
    )


def _evaluated_tasks(out: Path) -> list[str]:
    """Names of the tasks with scores, those with pictures taken away not counted."""
    found = sorted(path.parent.name for path in (out / "eval").glob("*/scores.json"))
    return [name for name in found if not name.endswith("-blank")]


def _task_result(out: Path, name: str) -> TaskResult:
    scores = _read_json(out / "eval" / name / "scores.json")
    blank_file = out / "eval" / f"{name}-blank" / "scores.json"
    metrics = scores["metrics"]
    blank = _read_json(blank_file)["metrics"] if blank_file.exists() else None
    series = {"with the picture": list(metrics.values())}
    if blank is not None:
        series["with a blank picture"] = [blank.get(key, 0.0) for key in metrics]
    label = _TASK_LABELS.get(name, name)
    svg = bars(
        f"task-{name}",
        f"{label}: accuracy by type of question",
        ["all" if key == "accuracy" else key.removeprefix("accuracy_") for key in metrics],
        series,
        text=percent,
        limit=1.0,
        reference=WORDS_ALONE.get(name),
        num_referenced=1,  # known over all questions, not by type
    )
    return TaskResult(
        name=name,
        label=label,
        num_questions=scores["n"],
        accuracy=metrics["accuracy"],
        blank=None if blank is None else blank["accuracy"],
        words_alone=WORDS_ALONE.get(name),
        svg=svg,
    )


def _retrieval_bars(retrieval: dict[str, Any]) -> Markup:
    directions = {"i2t": "caption", "t2i": "picture"}  # what is looked for
    keys = [f"{direction}_r{k}" for direction in directions for k in (1, 5, 10)]
    return bars(
        "retrieval",
        "Retrieval: recall at 1, 5 and 10, both directions",
        [f"{wanted}, first {k}" for wanted in directions.values() for k in (1, 5, 10)],
        {model: [retrieval[model][key] for key in keys] for model in ("dense", "clip_moe")},
        text=percent,
        limit=1.0,
    )


def _factor_bars(retrieval: dict[str, Any]) -> Markup:
    factors = retrieval["factors"]
    return bars(
        "factors",
        "Captions with one factor changed: accuracy by factor",
        list(factors["dense"]),
        {
            model: [factors[model][factor] for factor in factors["dense"]]
            for model in ("dense", "clip_moe")
        },
        text=percent,
        limit=1.0,
        reference=0.5,
    )


def _routing_by_tower(inspection: Inspection) -> dict[str, list[BlockRouting]]:
    towers: dict[str, list[BlockRouting]] = {}
    for block in inspection.blocks:
        towers.setdefault(block.name.split()[0], []).append(block)
    return towers


def draw_examples(out: Path, seed: int) -> tuple[list[Example], list[Example]]:
    """Pictures drawn from all questions alike, right or wrong, and others from the wrong ones.

    Every task gives its share of both. The draw depends on the seed alone.
    """
    names = _evaluated_tasks(out)
    examples, mistakes = [], []
    for number, name in enumerate(names):
        rng = random.Random(f"{seed}-{name}")
        predictions = _read_predictions(out / "eval" / name / "predictions.jsonl")
        rng.shuffle(predictions)
        shown = _share(NUM_EXAMPLES, len(names), number)
        wrong = [one for one in predictions[shown:] if not one["correct"]]
        task = get_task(name)
        examples += [_example(task, one) for one in predictions[:shown]]
        mistakes += [
            _example(task, one) for one in wrong[: _share(NUM_MISTAKES, len(names), number)]
        ]
    return examples, mistakes


def _share(total: int, parts: int, number: int) -> int:
    """What the ``number``-th of ``parts`` gets when ``total`` is shared out; the first get more."""
    return total // parts + (number < total % parts)


def _example(task: Task, prediction: dict[str, Any]) -> Example:
    file = io.BytesIO()
    task.open_image(prediction["image"]).save(file, "PNG", optimize=True)
    return Example(
        task=_TASK_LABELS.get(task.name, task.name),
        picture=f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}",
        question=prediction["prompt"],
        text=prediction["text"],
        answer=prediction["answer"],
        correct=prediction["correct"],
    )


def _recipes(out: Path) -> dict[str, str]:
    return {title: _read(out / folder / "recipe.yaml") for title, folder in _RECIPES.items()}


def _read_predictions(path: Path) -> list[dict[str, Any]]:
    # Not splitlines: an answer may hold a line separator of Unicode's.
    return [_parse(line, path) for line in _read(path).split("\n") if line]


def _read_json(path: Path) -> Any:
    return _parse(_read(path), path)


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON ({error}); delete its folder to make it again"
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read, and the report needs it ({error})") from error
