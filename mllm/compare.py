"""Paired comparison of checkpoints on the same questions.

The difference of each of the task's means, with a paired bootstrap interval (questions are drawn
with both their scores) and McNemar's exact test on those that only one of both answers rightly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mllm.evaluate import EvaluationConfig, evaluate_checkpoint
from mllm.evaluate_scores import PREDICTIONS, Prediction, judge, read_predictions, read_scores
from mllm.scoring import mcnemar_p_value, paired_bootstrap_interval
from mllm.tasks import Task, get_task
from mllm.versions import library_versions
from vision_moe import InputError, atomic_write_text, writable_folder

_HALF = 0.5


@dataclass(frozen=True)
class Difference:
    """Of one mean of the task, ``b - a``.

    Attributes:
        metric: Its name.
        n: Questions, or whatever the mean is over.
        a: Mean of the first.
        b: Mean of the second.
        low: Of the 95 % interval of the difference.
        high: Of the same.
        only_a: Where the first is right alone; ``None`` where nothing is right or wrong.
        only_b: Where the second is.
        p_value: McNemar's.
    """

    metric: str
    n: int
    a: float
    b: float
    low: float
    high: float
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None

    @property
    def difference(self) -> float:
        return self.b - self.a


@dataclass(frozen=True)
class Comparison:
    """Of a second checkpoint with a first.

    Attributes:
        names: Of both.
        differences: By the task's means.
        pairs: Both predictions of each question.
        num_unpaired: Questions that only one of both was asked, or whose truth is not known.
    """

    names: tuple[str, str]
    differences: list[Difference]
    pairs: list[tuple[Prediction, Prediction]] = field(repr=False)
    num_unpaired: int = 0

    def differing(self) -> list[tuple[Prediction, Prediction]]:
        """Questions with another score, the largest differences first, those for b before."""
        pairs = [(a, b) for a, b in self.pairs if a.score != b.score]
        return sorted(pairs, key=lambda pair: -abs(_gain(pair)))


def _gain(pair: tuple[Prediction, Prediction]) -> float:
    a, b = pair
    return (b.score or 0.0) - (a.score or 0.0)


def compare_checkpoints(
    sources: Sequence[str],
    task_name: str,
    config: EvaluationConfig | None = None,
    data: str | None = None,
    out: str | Path = "compare",
) -> list[Comparison]:
    """Compare each further source with the first, and write table, plot and page to ``out``.

    Args:
        sources: Checkpoints, which are evaluated below ``out``, or folders of evaluations.
        task_name: Of the questions.
        config: Of the evaluations, and the seed of the intervals.
        data: The task's data.
        out: Folder.

    Raises:
        InputError: A source is neither, or two were not asked the same.
    """
    from mllm.compare_page import draw, write_page

    config = config or EvaluationConfig()
    task = get_task(task_name, data)
    out = writable_folder(out)
    names = _names(sources)
    answers = {
        name: _predictions(source, name, task_name, config, data, out)
        for name, source in zip(names, sources, strict=True)
    }
    first = names[0]
    comparisons = [
        compare(task, (first, name), answers[first], answers[name], config.seed)
        for name in names[1:]
    ]
    content = {
        "task": task_name,
        "seed": config.seed,
        "versions": library_versions(),
        "sources": dict(zip(names, sources, strict=True)),
        "comparisons": [
            {
                "a": one.names[0],
                "b": one.names[1],
                "n": len(one.pairs),
                "num_unpaired": one.num_unpaired,
                "differences": [
                    {**asdict(each), "difference": each.difference} for each in one.differences
                ],
                "differing_questions": [a.question_id for a, _ in one.differing()],
            }
            for one in comparisons
        ],
    }
    atomic_write_text(out / "compare.json", json.dumps(content, indent=2) + "\n")
    draw(task, comparisons, out / "compare.png")
    write_page(task, comparisons, out / "compare.html", config.seed)
    return comparisons


def _names(sources: Sequence[str]) -> list[str]:
    """Of each source, as much of its path's end as tells it from the others."""
    if len(sources) < 2:
        raise InputError("there must be at least two to compare")
    paths = [Path(source).resolve() for source in sources]
    if len(set(paths)) < len(paths):
        raise InputError("one of those to compare is named twice")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["-".join(path.parts[-length:]) for path in paths]


def _predictions(
    source: str,
    name: str,
    task_name: str,
    config: EvaluationConfig,
    data: str | None,
    out: Path,
) -> list[Prediction]:
    if not (Path(source) / PREDICTIONS).is_file():
        return evaluate_checkpoint(source, task_name, config, data, out / name).predictions
    of_task = read_scores(source).get("task", task_name)
    if of_task != task_name:
        raise InputError(f"'{source}' holds answers to '{of_task}', not to '{task_name}'")
    return read_predictions(source)


def compare(
    task: Task,
    names: tuple[str, str],
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    seed: int = 0,
) -> Comparison:
    """Pair the answers by the question's id.

    Raises:
        InputError: No question is common to both, or one id is of two questions.
    """
    of_a = {one.question_id: one for one in judge(task, a, seed)[0] if one.score is not None}
    of_b = {one.question_id: one for one in judge(task, b, seed)[0] if one.score is not None}
    common = [question_id for question_id in of_a if question_id in of_b]
    if not common:
        raise InputError(f"'{names[0]}' and '{names[1]}' have no scored question in common")
    pairs = [(of_a[question_id], of_b[question_id]) for question_id in common]
    for one, other in pairs:
        if (one.prompt, one.image, one.answer) != (other.prompt, other.image, other.answer):
            raise InputError(
                f"question '{one.question_id}' is not the same in '{names[0]}' and '{names[1]}'"
            )
    items = [one.item for one, _ in pairs]
    means_a = task.means(items, [one.score or 0.0 for one, _ in pairs])
    means_b = task.means(items, [other.score or 0.0 for _, other in pairs])
    differences = [
        _difference(task, metric, means_a[metric], means_b[metric], seed) for metric in means_a
    ]
    num_unpaired = len({one.question_id for one in (*a, *b)}) - len(common)
    return Comparison(names, differences, pairs, num_unpaired)


def _difference(
    task: Task, metric: str, a: Sequence[float], b: Sequence[float], seed: int
) -> Difference:
    low, high = paired_bootstrap_interval(b, a, seed)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    if task.graded:
        return Difference(metric, len(a), mean_a, mean_b, low, high)
    # Half of the full mark, where there are marks between: VQA accuracy.
    right_a, right_b = [one >= _HALF for one in a], [one >= _HALF for one in b]
    pairs = list(zip(right_a, right_b, strict=True))
    return Difference(
        metric, len(a), mean_a, mean_b, low, high, pairs.count((True, False)),
        pairs.count((False, True)), mcnemar_p_value(right_a, right_b),
    )  # fmt: skip


def comparison_table(task: Task, comparisons: Sequence[Comparison]) -> str:
    """The differences as lines of text, in points of a hundred."""
    scale = 1 if task.graded else 100
    lines = []
    for one in comparisons:
        a, b = one.names
        lines.append(f"{task.name}, {len(one.pairs)} questions: {b} (B) against {a} (A)")
        width = max(len(each.metric) for each in one.differences)
        lines.append(
            f"  {'':<{width}}  {'n':>6} {'A':>7} {'B':>7}  {'B - A':>7} {'95 % interval':>16}"
            f"  {'only A':>6} {'only B':>6} {'McNemar p':>10}"
        )
        for each in one.differences:
            interval = f"{scale * each.low:+.1f} to {scale * each.high:+.1f}"
            line = (
                f"  {each.metric:<{width}}  {each.n:>6} {scale * each.a:>7.1f}"
                f" {scale * each.b:>7.1f}  {scale * each.difference:>+7.1f} {interval:>16}"
            )
            if each.p_value is not None:
                line += f"  {each.only_a:>6} {each.only_b:>6} {each.p_value:>10.2g}"
            lines.append(line)
        if one.num_unpaired:
            lines.append(f"  {one.num_unpaired} questions are not scored in both: left out")
    return "\n".join(lines)


def as_points(task: Task, value: float) -> float:
    """Shares of one as points of a hundred; what is graded stays."""
    return value if task.graded else 100 * value


def example_fields(pair: tuple[Prediction, Prediction]) -> dict[str, Any]:
    """What a page tells of a question that is answered differently."""
    a, b = pair
    truth = a.answer or ", ".join(dict.fromkeys(a.answers))
    return {"question": a.prompt, "truth": truth, "category": a.category, "a": a, "b": b,
            "gain": _gain(pair)}  # fmt: skip
