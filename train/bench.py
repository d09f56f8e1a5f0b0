"""``mllm bench train``: this toolkit's training beside the stock way, on the same questions.

Model, adapters, samples, optimiser, number format and number of steps are the same on both sides,
but that in pretraining ours multiplies with frozen weights in 8 bits (option ``int8_products``).
:mod:`train.bench_stock` says what the stock way is. Each side runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt

from mllm.bench import BenchReport, interleave, parse_options
from train.bench_data import BATCH_ROWS, PARTS, Part, write_conversations
from train.bench_sides import SIDES, AnySide, Job, side_process
from train.precision import use_bf16
from train.recipe import InstructionSource, Precision

_FASTER: dict[Part, float] = {"instruction": 4, "chat": 2, "pretrain": 3}


@dataclass(frozen=True)
class TrainOptions:
    """What ``key=value`` may set.

    Attributes:
        parts: Which comparisons; see :mod:`train.bench_data`.
        checkpoint: MLLM that ``instruction`` and ``chat`` start from; random connector and tower
            without.
        precision: Of both sides.
        int8_products: Of our side in ``pretrain``; see
            :class:`train.recipe.InstructionRecipe`.
        steps: Optimiser steps of a timed run.
        repeats: Timed runs of each side, on questions of their own.
        accuracy_images: Both sides are also tuned on all questions of so many pictures of easy-VQA,
            and examined. Only with a ``checkpoint``: it takes a tower that sees.
        test_questions: How many they are asked then.
        seed: Of data, order and adapters.
    """

    parts: tuple[Part, ...] = PARTS
    checkpoint: str | None = None
    precision: Precision = "auto"
    int8_products: bool = True
    steps: Annotated[int, Gt(0)] = 8
    repeats: Annotated[int, Gt(0)] = 3
    accuracy_images: Annotated[int, Ge(0)] = 120
    test_questions: Annotated[int, Gt(0)] = 1000
    seed: Annotated[int, Ge(0)] = 0


def run(overrides: Sequence[str]) -> BenchReport:
    """The benchmark ``train``."""
    options = parse_options(TrainOptions, overrides)
    report = BenchReport("train", config=dataclasses.asdict(options))
    report.facts["number format"] = "bf16 autocast" if use_bf16(options.precision) else "fp32"
    for part in options.parts:
        with tempfile.TemporaryDirectory(prefix="mllm-bench-") as folder, ExitStack() as stack:
            job = _job(part, options, Path(folder))
            sides = {
                "ours": stack.enter_context(side_process(job, "ours")),
                "stock": stack.enter_context(side_process(job, "stock")),
            }
            measure(report, part, options, sides)
    if options.checkpoint is not None and options.accuracy_images:
        _examine(report, options)
    return report


def _examine(report: BenchReport, options: TrainOptions) -> None:
    """Tune a model the one way, then another the other way, and ask both."""
    accuracy: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mllm-bench-") as folder:
        source = InstructionSource(name="easy_vqa", num_images=options.accuracy_images)
        job = _job_on("instruction", source, options, Path(folder))
        for name in SIDES:
            with side_process(job, name) as side:
                side.ask("train_on_all")
                accuracy[name] = side.ask("accuracy", options.test_questions)
                report.facts[f"accuracy, {name}"] = accuracy[name]
    report.add_ratio(
        "accuracy for the same questions", accuracy["ours"] / accuracy["stock"], ">=", 1
    )


def _job(part: Part, options: TrainOptions, folder: Path) -> Job:
    # One round more for the first call of everything, and one for batches that are not full.
    num_images = (options.repeats + 2) * options.steps * BATCH_ROWS[part]
    if part == "instruction":
        source = InstructionSource(name="easy_vqa", num_images=num_images)
    else:
        file = write_conversations(part, folder, num_images, options.seed)
        source = InstructionSource(name="llava_json", path=str(file))
    return _job_on(part, source, options, folder)


def _job_on(part: Part, source: InstructionSource, options: TrainOptions, folder: Path) -> Job:
    return Job(
        part, source, options.checkpoint, options.precision, options.steps,
        str(folder / "cache"), options.seed, options.int8_products and part == "pretrain",
    )  # fmt: skip


def measure(
    report: BenchReport, part: Part, options: TrainOptions, sides: Mapping[str, AnySide]
) -> None:
    """Rounds of training on ever new questions, then on the same ones again."""
    ours, stock = sides["ours"], sides["stock"]
    rounds = range(1, 1 + options.repeats)
    seconds = _rounds(sides, f"{part}, first epoch", options.repeats)
    report.add_repeats(seconds, f"{part}, ")
    first, again = f"{part}, ours", f"{part}, ours, second epoch"
    report.add_repeats(_rounds({again: ours}, again, options.repeats))
    held = f"{part}, ours, batches made beforehand"
    report.add_repeats(
        interleave(
            {held: _in_turn(ours, held=True), f"{again}, beside": _in_turn(ours)},
            repeats=options.repeats, description="input side",
        )
    )  # fmt: skip
    report.compare(
        f"{part}: speed in the first epoch", f"{part}, stock", first, ">=",
        1.0 if part == "pretrain" else _FASTER[part],
    )  # fmt: skip
    report.compare(
        f"{part}: speed from the second on", f"{part}, stock", again, ">=", _FASTER[part]
    )
    report.compare(f"{part}: input side", f"{again}, beside", held, "<=", 1.05)
    peaks = {name: side.ask("peak_memory") for name, side in sides.items()}
    report.add_ratio(f"{part}: peak memory", peaks["ours"] / peaks["stock"], "<=", 0.6)
    questions = sum(stock.ask("num_questions", number) for number in rounds)
    for label, values in (
        ("ours", report.repeats[first]),
        ("stock", report.repeats[f"{part}, stock"]),
    ):
        report.facts[f"{part}: {label}, questions per second"] = round(questions / sum(values), 2)
        report.facts[f"{part}: {label}, peak MiB"] = peaks[label] >> 20


def _rounds(sides: Mapping[str, AnySide], description: str, repeats: int) -> dict[str, list[float]]:
    return interleave(
        {label: _in_turn(side) for label, side in sides.items()},
        repeats=repeats,
        description=description,
    )


def _in_turn(side: AnySide, held: bool = False) -> Callable[[], float]:
    """Each call trains on the next round's rows; seconds."""
    numbers = itertools.count()
    return lambda: side.ask("train", next(numbers), held)
