"""What ``evidence.json`` holds as Markdown tables: means over seeds ± their standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from mllm.scenes import FACTORS
from train.clip_evaluation import I2T, T2I, ZERO_SHOT
from train.evidence.methods import ABLATIONS, ALL, LANGUAGE_MODELS

Cells = Mapping[str, Mapping[str, Any]]

#: Behind a task's name in a cell -> what a heading says of who answered.
ANSWERED_BY = {
    LANGUAGE_MODELS["stand_in"]: "",
    LANGUAGE_MODELS["pretrained"]: ", pretrained language model",
}


def tables(evidence: Mapping[str, Any]) -> str:
    """All of them, each with a heading."""
    cells: Cells = evidence["cells"]
    splits = evidence["config"]["splits"]
    parts = [("Claims", claims_table(evidence["claims"]))]
    parts.append((f"Retrieval R@1 and naming the main object, {', '.join(splits)}, %",
                  retrieval_table(without_ablations(cells), splits)))  # fmt: skip
    parts.append((f"One-factor changes told apart, {splits[0]}, % (50 is guessing)",
                  factor_table(without_ablations(cells), splits[0])))  # fmt: skip
    parts += [(f"Questions answered, {task}{told}, %", vqa_table(cells, task + suffix))
              for suffix, told in ANSWERED_BY.items()
              for task in evidence["config"]["num_questions"]
              if any(task + suffix in cell for cell in cells.values())]  # fmt: skip
    if readers := {name: cell for name, cell in cells.items() if "readers" in cell}:
        parts.append((f"Facts read from the tower's tokens by linear classifiers, {splits[0]}, %",
                      readers_table(readers)))  # fmt: skip
    if evidence["experts"]:
        experts = list(evidence["experts"].values())
        parts.append(("DMU's experts: from the best one to any one, R@1, %", oracle_table(experts)))
        parts.append(("Within the clusters of the stages before, R@1, %",
                      suppression_table(experts)))  # fmt: skip
        parts.append(("Without an expert, R@1, points", leave_one_out_table(experts)))
        parts.append(("Routing of pictures and captions, mean of blocks", routing_table(experts)))
    if len(without_ablations(cells)) < len(cells):
        parts.append(("One thing of DMU changed, beside DMU with the same seed, %",
                      ablations_table(cells, splits)))  # fmt: skip
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts) + "\n"


def without_ablations(cells: Cells) -> Cells:
    """The cells of the methods of the claims."""
    return {name: cell for name, cell in cells.items() if cell["method"] not in ABLATIONS}


def seeds_of(cells: Cells, method: str) -> list[Mapping[str, Any]]:
    """A method's cells, one for each seed."""
    return [cell for cell in cells.values() if cell["method"] == method]


def mean_r1(scores: Mapping[str, float]) -> float:
    """Mean of both directions."""
    return (scores[I2T] + scores[T2I]) / 2


def claims_table(claims: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, claim in claims.items():
        if claim["difference"] is None:
            rows.append([name, "nothing gained", "", str(claim["seeds"]), "", "no"])
            continue
        goal = f"≥ {claim['goal']:g}" + (", interval above 0" if claim["above_zero"] else "")
        interval = f"{claim['low']:.2f} to {claim['high']:.2f}"
        rows.append([name, f"{claim['difference']:.2f}", interval, str(claim["seeds"]), goal,
                     "yes" if claim["reached"] else "**no**"])  # fmt: skip
    return markdown(["claim", "difference", "95 % interval", "seeds", "goal", "reached"], rows)


def retrieval_table(cells: Cells, splits: Sequence[str]) -> str:
    asked: list[tuple[str, Callable[[Mapping[str, float]], float]]] = [
        ("picture to text", itemgetter(I2T)),
        ("text to picture", itemgetter(T2I)),
        ("mean", mean_r1),
        ("main object", itemgetter(ZERO_SHOT)),
    ]
    columns = [(f"{split}: {name}", _of(split, get)) for split in splits for name, get in asked]
    return _by_method(cells, columns)


def factor_table(cells: Cells, split: str) -> str:
    return _by_method(cells, [(factor, _of(split, _value(factor))) for factor in FACTORS])


def vqa_table(cells: Cells, task: str) -> str:
    asked = {name: cell for name, cell in cells.items() if task in cell}
    keys = sorted({key for cell in asked.values() for key in cell[task]} - {"accuracy"})
    keys = ["accuracy", *(key for key in keys if key.startswith("accuracy"))]
    columns = [(key.removeprefix("accuracy_"), _of(task, _value(key))) for key in keys]
    return _by_method(asked, columns)


def readers_table(cells: Cells) -> str:
    rows = []
    for method in ALL:
        found = [cell["readers"] for cell in seeds_of(cells, method)]
        for tokens, said in (("cls", "class token"), ("patches", "patches")):
            if found:
                scores = [[one.get(fact, {}).get(tokens, math.nan) for one in found]
                          for fact in FACTORS]  # fmt: skip
                rows.append([f"{ALL[method].title}: {said}", *map(_mean, scores)])
    return markdown(["", *FACTORS], rows)


def oracle_table(experts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for query in experts[0]["oracle"]:
        gaps = [one["oracle"][query] for one in experts]
        controls = [one["control_oracle"][query] for one in experts if one["control_oracle"]]
        row = [query, *(_mean([gap[key] for gap in gaps])
                        for key in ("best_single", "mixture", "oracle"))]  # fmt: skip
        excess = [
            (gap["oracle"] - gap["best_single"]) - (control["oracle"] - control["best_single"])
            for gap, control in zip(gaps, controls, strict=False)
        ]
        row += [_mean([one["oracle"] for one in controls]), _mean(excess)]
        rows.append(row)
    return markdown(["question", "best expert", "mixture", "any expert",
                     "any seed-only expert", "excess of the gap"], rows)  # fmt: skip


def suppression_table(experts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for number, stage in enumerate(experts[0]["suppression"]):
        found = [one["suppression"][number] for one in experts]
        found = [one for one in found if "before" in one]
        rows.append([
            str(stage["stage"]),
            f"{statistics.mean(one['num_clusters'] for one in found):.0f}" if found else "–",
            _mean([one["before"] for one in found]),
            _mean([one["after"] for one in found]),
            _mean([one["after"] - one["before"] for one in found]),
        ])  # fmt: skip
    return markdown(["stage", "clusters", "stage before", "this stage", "difference"], rows)


def leave_one_out_table(experts: Sequence[Mapping[str, Any]]) -> str:
    queries = ("picture to text", "text to picture")
    rows = [
        [left_out, *(_mean([one["leave_one_out"][left_out][query]["difference"]
                            for one in experts]) for query in queries)]
        for left_out in experts[0]["leave_one_out"]
    ]  # fmt: skip
    return markdown(["left out", *queries], rows)


def routing_table(experts: Sequence[Mapping[str, Any]]) -> str:
    keys = ("load_entropy", "max_violation", "num_dead", "token_entropy")
    kinds = list(dict.fromkeys(kind for block in experts[0]["routing"].values() for kind in block))
    rows = []
    for kind in kinds:
        values: dict[str, list[float]] = {key: [] for key in keys}
        for one in experts:
            blocks = [block[kind] for block in one["routing"].values() if kind in block]
            for key in keys:
                values[key].append(statistics.mean(block[key] for block in blocks))
        rows.append([kind, *(_mean(values[key], scale=1, digits=2) for key in keys)])
    return markdown(["tokens", "load entropy / log N", "largest violation", "dead experts",
                     "token entropy / log N"], rows)  # fmt: skip


def ablations_table(cells: Cells, splits: Sequence[str]) -> str:
    """In brackets the difference from DMU, where it ran with that seed."""
    asked = {f"{split}: R@1": _of(split, mean_r1) for split in splits}
    asked[f"{splits[0]}: main object"] = _of(splits[0], itemgetter(ZERO_SHOT))
    seeds = {cell["seed"] for cell in cells.values() if cell["method"] in ABLATIONS}
    rows = []
    for method in ("dmu", *ABLATIONS):
        found = [cell for cell in seeds_of(cells, method) if cell["seed"] in seeds]
        whole = [cell for cell in found if f"dmu-{cell['seed']}" in cells]
        row = [ALL[method].title]
        for value in asked.values():
            text = _mean([value(one) for one in found])
            if method != "dmu" and whole:
                change = [value(one) - value(cells[f"dmu-{one['seed']}"]) for one in whole]
                text += f" ({100 * statistics.mean(change):+.1f})"
            row.append(text)
        if found:
            rows.append(row)
    return markdown(["", *asked], rows)


def _of(part: str, get: Callable[[Mapping[str, float]], float]) -> Callable[[Any], float]:
    return lambda cell: get(cell[part])


def _value(key: str) -> Callable[[Mapping[str, float]], float]:
    """NaN where a small test holds no such case."""
    return lambda scores: scores.get(key, float("nan"))


def _by_method(
    cells: Cells, columns: Sequence[tuple[str, Callable[[Mapping[str, Any]], float]]]
) -> str:
    rows = []
    for method in ALL:
        found = seeds_of(cells, method)
        if found:
            rows.append([ALL[method].title, *(_mean([value(one) for one in found])
                                              for _, value in columns)])  # fmt: skip
    return markdown(["", *(name for name, _ in columns)], rows)


def _mean(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """``mean ± standard deviation``; of one seed the value."""
    known = [scale * value for value in values if not math.isnan(value)]
    if not known:
        return "–"
    text = f"{statistics.mean(known):.{digits}f}"
    return text + (f" ± {statistics.stdev(known):.{digits}f}" if known[1:] else "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
