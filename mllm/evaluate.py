"""Evaluation: a task's questions answered by a model, and what is needed to do it again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm.evaluate_answers import AnswerLog
from mllm.evaluate_scores import (
    Evaluation,
    Prediction,
    judge,
    read_predictions,
    rescore,
    scores_table,
)
from mllm.generation import Answer, Answerer, Request
from mllm.model import load_mllm
from mllm.prompts import ChatPrompts
from mllm.tasks import Task, TaskItem, get_task
from mllm.tasks.records import read_records
from mllm.versions import library_versions
from vision_moe import InputError, sha256_file, writable_folder

__all__ = [
    "Evaluation", "EvaluationConfig", "Prediction", "evaluate_answers", "evaluate_checkpoint",
    "evaluate_model", "read_predictions", "rescore", "scores_table",
]  # fmt: skip

_GRAY = (128, 128, 128)
_BLANK = "blank"


@dataclass(frozen=True)
class EvaluationConfig:
    """Everything that is chosen in an evaluation.

    Attributes:
        num_questions: How many are drawn; the task's own number when it is ``None``.
        seed: Of the draw and of the bootstrap intervals.
        blank_images: Show one mid-grey picture instead of each: what the words alone give.
        batch_size: Questions answered at once.
        bf16: Autocast to bfloat16: faster on a GPU, but greedy answers may change.
        answer_by: ``generation``, or ``likelihood``: the likeliest of a question's choices.
        processes: How many answer, each with the model in memory.
    """

    num_questions: int | None = None
    seed: int = 0
    blank_images: bool = False
    batch_size: int = 64
    bf16: bool = False
    answer_by: Literal["generation", "likelihood"] = "generation"
    processes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"the batch size is {self.batch_size} and must be at least 1")
        if self.processes < 1:
            raise InputError(f"there are {self.processes} processes and must be at least 1")
        if self.seed < 0:
            raise InputError(f"the seed is {self.seed} and must not be negative")


def evaluate_checkpoint(
    checkpoint: str | Path,
    task_name: str,
    config: EvaluationConfig | None = None,
    data: str | None = None,
    out: str | Path | None = None,
) -> Evaluation:
    """Evaluate a saved MLLM and write the result to ``out``.

    An evaluation of the same into ``out`` that was interrupted goes on where it stopped.

    Raises:
        InputError: Checkpoint or data are missing or damaged, or ``out`` cannot be written.
    """
    config = config or EvaluationConfig()
    task = get_task(task_name, data)
    if config.processes > 1 and out is None:
        raise InputError("several processes need a folder for their answers")
    if out is not None:
        writable_folder(out)
    num_threads = torch.get_num_threads()
    share = max(1, num_threads // config.processes)
    others = _Others(
        config.processes, (share, str(checkpoint), task_name, config, data, str(out))
    )
    torch.set_num_threads(share)
    try:
        with others:
            model, processor = load_mllm(checkpoint)
            return evaluate_model(
                model, processor, task, config, str(checkpoint), out=out, others=others
            )
    finally:
        torch.set_num_threads(num_threads)


def evaluate_model(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    task: Task,
    config: EvaluationConfig | None = None,
    checkpoint: str = "",
    progress: bool = True,
    out: str | Path | None = None,
    others: _Others | None = None,
) -> Evaluation:
    """Evaluate a model in memory.

    Args:
        model: The MLLM.
        processor: Its processor.
        task: From :func:`mllm.tasks.get_task`.
        config: What is chosen.
        checkpoint: Where the model comes from, for the record.
        progress: Show bars on stderr.
        out: Folder to keep answers in while they are given, and to write the result to.
        others: Processes that answer their share.
    """
    config = config or EvaluationConfig()
    items = task.load(config.num_questions, config.seed)
    requests = [_request(task, item, config) for item in items]
    record = _record(model, processor, task, config, checkpoint)
    log = None if out is None else AnswerLog(Path(out), _depends_on(record, task))
    answers = {} if log is None else log.read()
    answers |= _answer(model, processor, task, config, requests, answers, log, 0, progress)
    if others is not None and log is not None and config.processes > 1:
        others.wait()
        answers = log.read() | answers
        # What is still open had a fault in another process: asked again, it is told here.
        alone = replace(config, processes=1)
        answers |= _answer(model, processor, task, alone, requests, answers, None, 0, False)
    predictions = [
        _prediction(item, request, answers[request])
        for item, request in zip(items, requests, strict=True)
    ]
    more = {"duplicate_id": task.duplicate_ids}
    judged, result = judge(task, predictions, config.seed, more)
    evaluation = Evaluation({"task": task.name, **result, **record}, judged)
    if out is not None:
        evaluation.save(out)
    if log is not None:
        log.remove()
    return evaluation


def evaluate_answers(
    file: str | Path,
    task_name: str,
    config: EvaluationConfig | None = None,
    data: str | None = None,
    out: str | Path | None = None,
) -> Evaluation:
    """Score answers that another program gave.

    Args:
        file: JSONL with ``question_id`` and ``text``, as LLaVA's scripts write it.
        task_name: Of the questions.
        config: Which of them were asked.
        data: The task's data.
        out: Folder of the result.

    Raises:
        InputError: The file cannot be read, or answers nothing of this task.
    """
    config = config or EvaluationConfig()
    task = get_task(task_name, data)
    items = task.load(config.num_questions, config.seed)
    texts: dict[str, str] = {}
    twice = []
    for record in read_records(Path(file)):
        question_id = record.text("question_id")
        if question_id in texts:
            twice.append(question_id)
        texts.setdefault(question_id, record.text("text", default="").strip())
    asked = {item.question_id for item in items}
    if not asked & texts.keys():
        raise InputError(
            f"{file}: none of its {len(texts)} question ids is one of task '{task_name}'; these are"
            " answers to something else"
        )
    predictions = []
    for item in items:
        text = texts.get(item.question_id)
        answer = Answer("", fault="it is not in the answer file") if text is None else Answer(text)
        predictions.append(_prediction(item, Request(None, task.prompt(item)), answer))
    more = {
        "duplicate_id": task.duplicate_ids,
        "missing": [item.question_id for item in items if item.question_id not in texts],
        "unknown_id": [question_id for question_id in texts if question_id not in asked],
        "answered_twice": twice,
    }
    judged, result = judge(task, predictions, config.seed, more)
    record_of_file = {
        "checkpoint": str(file), "checkpoint_sha256": sha256_file(file), "prompt": None,
        "seed": config.seed, "versions": library_versions(), "config": asdict(config),
    }  # fmt: skip
    evaluation = Evaluation({"task": task.name, **result, **record_of_file}, judged)
    if out is not None:
        evaluation.save(out)
    return evaluation


def _request(task: Task, item: TaskItem, config: EvaluationConfig) -> Request:
    # With one key for all blank pictures, each question is answered once.
    blank = config.blank_images and item.image_key is not None
    choices: tuple[str, ...] = ()
    if config.answer_by == "likelihood":
        choices = task.choices(item)
        if not choices:
            raise InputError(
                f"task '{task.name}', question '{item.question_id}': it has no choices, so that it"
                " cannot be answered by likelihood"
            )
    return Request(_BLANK if blank else item.image_key, task.prompt(item), choices)


def _prediction(item: TaskItem, request: Request, answer: Answer) -> Prediction:
    return Prediction(
        question_id=item.question_id,
        image=item.image_key,
        category=item.category,
        prompt=request.question,
        text=answer.text,
        answer=item.answer,
        answers=item.answers,
        options=item.options,
        finished=answer.finished,
        fault=answer.fault,
    )


def _record(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    task: Task,
    config: EvaluationConfig,
    checkpoint: str,
) -> dict[str, Any]:
    """How the scores come about."""
    return {
        "checkpoint": checkpoint,
        "checkpoint_sha256": _checkpoint_hash(checkpoint),
        "prompt": ChatPrompts(processor, model.config.image_seq_length).template,
        "seed": config.seed,
        "versions": library_versions(),
        "config": {
            **asdict(config),
            "max_new_tokens": task.max_new_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "image_processor": json.loads(processor.image_processor.to_json_string()),
        },
    }


def _depends_on(record: dict[str, Any], task: Task) -> dict[str, Any]:
    """What an answer to a prompt depends on: not on how many are asked, nor by whom."""
    config = {
        key: value
        for key, value in record["config"].items()
        if key not in ("num_questions", "seed", "processes")
    }
    data = None if task.data is None else os.path.abspath(task.data)
    # A folder that was moved holds the same model, which its hash tells.
    checkpoint = record["checkpoint"] if record["checkpoint_sha256"] is None else None
    return {
        **record, "seed": None, "checkpoint": checkpoint, "config": config, "task": task.name,
        "data": data,
    }  # fmt: skip


def _checkpoint_hash(checkpoint: str) -> str | None:
    """SHA-256 over names and hashes of the files that the model is made from."""
    folder = Path(checkpoint)
    if not checkpoint or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        is_part = path.suffix in (".safetensors", ".model") or "config" in path.name
        if is_part or path.name.startswith(("tokenizer", "chat_template", "vocab", "merges")):
            stat = path.stat()
            digest.update(f"{path.name} {_hash(path, stat.st_mtime_ns, stat.st_size)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _hash(path: Path, modified: int, size: int) -> str:
    return sha256_file(path)


def _answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    task: Task,
    config: EvaluationConfig,
    requests: Sequence[Request],
    answered: dict[Request, Answer],
    log: AnswerLog | None,
    process: int,
    progress: bool,
) -> dict[Request, Answer]:
    """Answers to this process's share of what is still open."""
    distinct = list(dict.fromkeys(requests))
    keys = list(dict.fromkeys(request.image_key for request in distinct))
    mine = set(keys[process :: config.processes])  # a picture's questions stay together
    asked = [
        request for request in distinct if request.image_key in mine and request not in answered
    ]

    def open_image(key: Hashable) -> Image.Image:
        if config.blank_images:
            return Image.new("RGB", (64, 64), _GRAY)  # uniform: resizing changes nothing
        return task.open_image(str(key))

    answerer = Answerer(
        model,
        processor,
        task.max_new_tokens,
        config.batch_size,
        torch.bfloat16 if config.bf16 else None,
    )
    answers: dict[Request, Answer] = {}
    already = sum(request.image_key in mine and request in answered for request in distinct)
    with (
        nullcontext() if log is None else log.append(process) as writer,
        tqdm(
            total=already + len(asked), initial=already, desc="answers", unit="q",
            disable=not progress,
        ) as bar,
    ):  # fmt: skip
        for request, answer in answerer.answer(asked, open_image):
            answers[request] = answer
            if writer is not None:
                writer.write(request, answer)
            bar.update()
    return answers


class _Others:
    """The processes beside this one, ended with it.

    Args:
        num_processes: How many answer in all.
        arguments: Of :func:`_answer_share`, after the process's number.
    """

    def __init__(self, num_processes: int, arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = [
            context.Process(target=_answer_share, args=(number, *arguments), daemon=True)
            for number in range(1, num_processes)
        ]

    def __enter__(self) -> None:
        for process in self._processes:
            process.start()

    def __exit__(self, *_exception: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.terminate()

    def wait(self) -> None:
        """Until each has answered its share.

        Raises:
            InputError: One of them ended before that.
        """
        for number, process in enumerate(self._processes, start=1):
            process.join()
            if process.exitcode != 0:
                raise InputError(
                    f"process {number} of the evaluation ended with status {process.exitcode};"
                    " the same command goes on where it stopped"
                )


def _answer_share(
    process: int,
    num_threads: int,
    checkpoint: str,
    task_name: str,
    config: EvaluationConfig,
    data: str | None,
    out: str,
) -> None:
    """What another process does: its share of the questions, into its answer file."""
    torch.set_num_threads(num_threads)
    task = get_task(task_name, data)
    num_gpus = torch.cuda.device_count()
    device = f"cuda:{process % num_gpus}" if num_gpus else None
    model, processor = load_mllm(checkpoint, device=device)
    items = task.load(config.num_questions, config.seed)
    requests = [_request(task, item, config) for item in items]
    record = _record(model, processor, task, config, checkpoint)
    log = AnswerLog(Path(out), _depends_on(record, task))
    _answer(model, processor, task, config, requests, log.read(), log, process, False)
