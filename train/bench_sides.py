"""One side of ``mllm bench train``, in a process of its own, whose memory is that side's alone."""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from mllm.allocator import keep_freed_memory
from mllm.evaluate import EvaluationConfig, evaluate_model
from mllm.tasks import get_task
from train.batch_plan import largest_first
from train.bench_data import Part, bench_model, bench_recipe
from train.bench_stock import StockCollator, stock_samples, train_stock
from train.engine import RunSettings, fit
from train.instruction import build_rows, tower_features
from train.instruction_data import BatchDataset, plan_epoch
from train.instruction_model import InstructionModel
from train.instruction_sources import load_sources
from train.precision import use_bf16
from train.recipe import InstructionSource, Precision
from train.schedule import learning_rate_schedule
from train.starting_model import set_parts
from vision_moe import InputError

SideName = Literal["ours", "stock"]
SIDES: tuple[SideName, ...] = ("ours", "stock")


@dataclass(frozen=True)
class Job:
    """What a side trains.

    Attributes:
        part: Which of the comparisons.
        source: The data.
        checkpoint: The MLLM to start from; random weights of tower and connector without.
        precision: Of both sides.
        steps: Optimiser steps of a round.
        cache: Folder of the features.
        seed: Of order and adapters.
        int8_products: Of our side.
    """

    part: Part
    source: InstructionSource
    checkpoint: str | None
    precision: Precision
    steps: int
    cache: str
    seed: int = 0
    int8_products: bool = False


class Side:
    """A model with its data; each call of :meth:`train` is a training run on a round's rows."""

    def __init__(self, job: Job, name: SideName) -> None:
        self.job = job
        self.name = name
        self.recipe = bench_recipe(job.part, job.source, job.precision, job.cache)
        self.model, self.processor = bench_model(job.part, job.checkpoint)
        self.data = load_sources(self.recipe.data, job.seed)
        self.rows = build_rows(self.recipe, self.model, self.processor, self.data.samples)
        self.parts = set_parts(self.recipe, self.model)
        lengths = [len(row) for row in self.rows]
        rng = np.random.default_rng(job.seed)
        recipe = self.recipe
        plan = plan_epoch(lengths, recipe.batch_rows, recipe.max_tokens_per_batch, rng)
        whole = [batch for batch in plan if len(batch) == recipe.batch_rows]
        self.batches = largest_first(whole, np.array(lengths), job.steps)  # as a run begins
        self.bf16 = use_bf16(job.precision)
        if name == "ours":
            self.pictures = tower_features(
                recipe, self.model, self.processor, self.data, cache=Path(job.cache)
            )
        else:
            self.model.model.vision_tower.eval()

    @property
    def num_rounds(self) -> int:
        return len(self.batches) // self.job.steps

    def round(self, number: int) -> list[list[int]]:
        """Row numbers of the round's batches."""
        return self.batches[number * self.job.steps : (number + 1) * self.job.steps]

    def num_questions(self, number: int) -> int:
        return sum(
            int(self.rows[row].branch_ids.max()) for batch in self.round(number) for row in batch
        )

    def train(self, batches: Sequence[Sequence[int]], held: bool = False) -> float:
        """Train on rows, by number; seconds.

        Args:
            batches: Of our side; the stock side shuffles their questions, in as many batches.
            held: Ours only: all that the input side does is done before the clock runs.
        """
        groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": getattr(self.recipe.trainable, part).lr}
            for part, parameters in self.parts.parameters.items()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        scheduler = learning_rate_schedule(optimizer, "cosine", 1, len(batches))
        if self.name == "stock":
            samples = [
                one for batch in batches for row in batch for one in stock_samples(self.rows[row])
            ]
            random.Random(self.job.seed).shuffle(samples)
            collator = StockCollator(self.processor, self.data.open_images)
            started = time.perf_counter()
            train_stock(
                self.model,
                samples,
                collator,
                optimizer,
                scheduler,
                batch_size=-(-len(samples) // len(batches)),
                steps=len(batches),
                seed=self.job.seed,
                bf16=self.bf16,
            )
            return time.perf_counter() - started
        dataset: Dataset[Any] = BatchDataset(
            self.rows, batches, self.pictures, self.processor.tokenizer.pad_token_id or 0
        )
        if held:
            dataset = _Held(dataset, len(batches))
        wrapped = InstructionModel(self.model, int8_products=self.job.int8_products)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            settings = RunSettings(
                folder=Path(folder) / "run",
                fingerprint="",
                description=self.job.part,
                seed=self.job.seed,
                bf16=self.bf16,
                log_steps=len(batches),
            )
            fit(wrapped, dataset, optimizer, scheduler, len(batches), settings)
            return time.perf_counter() - started


class _Held(Dataset[Any]):
    def __init__(self, batches: Any, count: int) -> None:
        self.items = [batches[number] for number in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def peak_memory() -> int:
    """Most bytes that this process has held; not those of the program that started it."""
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class AnySide(Protocol):
    def ask(self, what: str, *arguments: Any) -> Any: ...


class SideProcess:
    """A :class:`Side` elsewhere. Everything it is asked for is done there, one after another."""

    def __init__(self, job: Job, name: SideName) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, name, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, *arguments: Any) -> Any:
        """Call a function of :class:`Answers`."""
        try:
            self._connection.send((what, arguments))
            return self._connection.recv()
        except (EOFError, OSError) as error:  # it holds the other end no longer
            self._process.join()
            raise InputError(
                f"the benchmark's side '{self._name}' ended before its answer to '{what}', with"
                f" {_end_of(self._process.exitcode)}"
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # it has ended by itself
            self._connection.send(None)
        self._process.join()


def _end_of(status: int | None) -> str:
    """In words; of a process that was killed the signal, which without enough memory is 9."""
    if status is not None and status < 0:
        return f"signal {-status} ({signal.Signals(-status).name})"
    return f"exit status {status}"


@contextmanager
def side_process(job: Job, name: SideName) -> Iterator[SideProcess]:
    """A side that lives as long as the block."""
    side = SideProcess(job, name)
    try:
        yield side
    finally:
        side.close()


class Answers:
    """What a side can be asked."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def num_rounds(self) -> int:
        return self.side.num_rounds

    def num_questions(self, number: int) -> int:
        return self.side.num_questions(number)

    def train(self, number: int, held: bool = False) -> float:
        return self.side.train(self.side.round(number), held)

    def peak_memory(self) -> int:
        return peak_memory()

    def train_on_all(self) -> float:
        return self.side.train(self.side.batches)

    def accuracy(self, num_questions: int) -> float:
        """Of easy-VQA's test questions, adapters merged; after it the side does not train."""
        side = self.side
        side.parts.merge()
        config = EvaluationConfig(num_questions, bf16=side.bf16)
        task = get_task("easy_vqa")
        evaluation = evaluate_model(side.model.eval(), side.processor, task, config, progress=False)
        accuracy: float = evaluation.scores["metrics"]["accuracy"]
        return accuracy


def _serve(job: Job, name: SideName, connection: Connection) -> None:
    if name == "ours":
        keep_freed_memory()  # as in ``mllm train``
    answers = Answers(Side(job, name))
    while (request := connection.recv()) is not None:
        what, arguments = request
        connection.send(getattr(answers, what)(*arguments))
