"""Evaluation: a task's questions answered by generation, and what is needed to do it again."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm.generation import Request, generate_answers
from mllm.model import load_mllm
from mllm.prompts import ChatPrompts
from mllm.tasks import Task, get_task
from mllm.versions import library_versions
from vision_moe import InputError, atomic_write_text, writable_folder

_GRAY = (128, 128, 128)


@dataclass(frozen=True)
class EvaluationConfig:
    """Everything that is chosen in an evaluation.

    Attributes:
        num_questions: How many are drawn; the task's own number when it is ``None``.
        seed: Of the draw.
        blank_images: Show one mid-grey picture instead of each: what the words alone give.
        batch_size: Questions answered at once.
        bf16: Autocast to bfloat16: faster on a GPU, but greedy answers may change.
    """

    num_questions: int | None = None
    seed: int = 0
    blank_images: bool = False
    batch_size: int = 64
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"the batch size is {self.batch_size} and must be at least 1")
        if self.seed < 0:
            raise InputError(f"the seed is {self.seed} and must not be negative")


@dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.jsonl``."""

    question_id: str
    image: str
    category: str
    prompt: str
    text: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """``scores.json`` and the lines of ``predictions.jsonl``."""

    scores: dict[str, Any]
    predictions: list[Prediction] = field(repr=False)

    def save(self, folder: str | Path) -> None:
        """Write both files; the scores come last, so that where they are, all is."""
        folder = writable_folder(folder)
        lines = [json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self.predictions]
        atomic_write_text(folder / "predictions.jsonl", "".join(lines))
        scores = json.dumps(self.scores, indent=2, ensure_ascii=False) + "\n"
        atomic_write_text(folder / "scores.json", scores)


def evaluate_checkpoint(
    checkpoint: str | Path,
    task_name: str,
    config: EvaluationConfig | None = None,
    data: str | None = None,
    out: str | Path | None = None,
) -> Evaluation:
    """Evaluate a saved MLLM and write the result to ``out``."""
    task = get_task(task_name, data)
    model, processor = load_mllm(checkpoint)
    if out is not None:
        writable_folder(out)
    evaluation = evaluate_model(model, processor, task, config, checkpoint=str(checkpoint))
    if out is not None:
        evaluation.save(out)
    return evaluation


def evaluate_model(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    task: Task,
    config: EvaluationConfig | None = None,
    checkpoint: str = "",
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model in memory.

    Args:
        model: The MLLM.
        processor: Its processor.
        task: From :func:`mllm.tasks.get_task`.
        config: What is chosen.
        checkpoint: Where the model comes from, for the record.
        progress: Show bars on stderr.
    """
    config = config or EvaluationConfig()
    items = task.load(config.num_questions, config.seed)
    # The key is of no use to a blank picture: with one for all, each question is answered once.
    requests = [
        Request(None if config.blank_images else item.image_key, task.prompt(item))
        for item in items
    ]

    def open_image(key: Hashable) -> Image.Image:
        if config.blank_images:
            return Image.new("RGB", (64, 64), _GRAY)  # uniform: resizing changes nothing
        return task.open_image(str(key))

    texts = generate_answers(
        model,
        processor,
        requests,
        open_image,
        max_new_tokens=task.max_new_tokens,
        batch_size=config.batch_size,
        autocast_dtype=torch.bfloat16 if config.bf16 else None,
        progress=progress,
    )
    predictions = [
        Prediction(
            question_id=item.question_id,
            image=item.image_key,
            category=item.category,
            prompt=request.question,
            text=text,
            answer=item.answer,
            correct=task.is_correct(item, text),
        )
        for item, request, text in zip(items, requests, texts, strict=True)
    ]
    scores = {
        "task": task.name,
        "metrics": task.metrics(items, [prediction.correct for prediction in predictions]),
        "n": len(items),
        "checkpoint": checkpoint,
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
    return Evaluation(scores, predictions)


def scores_table(scores: dict[str, Any]) -> str:
    """The metrics as lines of text, percentages."""
    head = f"{scores['task']}, {scores['n']} questions, seed {scores['seed']}"
    if scores["config"]["blank_images"]:
        head += ", blank pictures"
    width = max(map(len, scores["metrics"]))
    lines = [
        f"  {name:<{width}}  {100 * value:5.1f} %" for name, value in scores["metrics"].items()
    ]
    return "\n".join([head, *lines])
