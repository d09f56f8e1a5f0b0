"""Questions answered per second, beside the loop that LLaVA's evaluation scripts use.

That loop (``llava/eval/model_vqa_loader.py``) takes one question at a time: it opens and encodes
the picture, calls ``generate`` with at most 128 new tokens, greedy, and decodes. Here it is written
for the stock Hugging Face classes. Both answer the same questions of easy-VQA's test split, and
have to give the same answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm.bench.measure import interleave
from mllm.bench.options import parse_options
from mllm.bench.report import BenchReport
from mllm.generation import Request, generate_answers
from mllm.model import load_mllm
from mllm.tasks import Task, TaskItem, get_task
from vision_moe import InputError

GOAL = 5.0
_MAX_NEW_TOKENS = 128
_OURS, _LOOP = "mllm eval", "LLaVA's loop"


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured.

    Attributes:
        checkpoint: An MLLM folder, such as the quickstart's.
        num_questions: About how many, each time.
        repeats: Rounds that count.
        seed: Of the draws.
        batch_size: Of ours.
    """

    checkpoint: str = "quickstart/mllm"
    num_questions: int = 150
    repeats: int = 3
    seed: int = 0
    batch_size: int = 64


def run(overrides: Sequence[str]) -> BenchReport:
    """Measure both on all questions of some pictures, and on questions drawn one by one.

    The test split asks 9.7 questions a picture; a small draw of questions meets most pictures once.
    """
    options = parse_options(EvaluationOptions, overrides)
    if options.num_questions < 1 or options.repeats < 1:
        raise InputError("num_questions and repeats must be at least 1")
    task = get_task("easy_vqa")
    model, processor = load_mllm(options.checkpoint)
    report = BenchReport("eval", asdict(options))
    draws = {
        "all questions of a picture": whole_pictures(task, options.num_questions, options.seed),
        "questions drawn one by one": task.load(options.num_questions, options.seed),
    }
    for name, items in draws.items():
        _measure(report, name, task, model, processor, items, options)
    return report


def whole_pictures(task: Task, num_questions: int, seed: int) -> list[TaskItem]:
    """All questions of pictures drawn at random, as many as come near to ``num_questions``."""
    by_image: dict[str | None, list[TaskItem]] = {}
    for item in task.all_items(seed):
        by_image.setdefault(item.image_key, []).append(item)
    pictures = list(by_image.values())
    random.Random(seed).shuffle(pictures)
    drawn: list[TaskItem] = []
    while pictures and len(drawn) < num_questions:
        drawn += pictures.pop()
    return drawn


def _measure(
    report: BenchReport,
    name: str,
    task: Task,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    items: Sequence[TaskItem],
    options: EvaluationOptions,
) -> None:
    answers: dict[str, list[str]] = {}

    def ours() -> None:
        requests = [Request(item.image_key, task.prompt(item)) for item in items]
        answers[_OURS] = generate_answers(
            model, processor, requests, lambda key: task.open_image(str(key)), _MAX_NEW_TOKENS,
            options.batch_size, progress=False,
        )  # fmt: skip

    def loop() -> None:
        answers[_LOOP] = llava_loop(model, processor, task, items)

    seconds = interleave({_OURS: ours, _LOOP: loop}, options.repeats, description=name)
    rates = {label: [len(items) / one for one in values] for label, values in seconds.items()}
    report.add_repeats(rates, prefix=f"{name}, questions/s: ")
    report.compare(
        f"{name}: {_OURS} / {_LOOP}",
        f"{name}, questions/s: {_OURS}",
        f"{name}, questions/s: {_LOOP}",
        ">=",
        GOAL,
    )
    same = sum(a == b for a, b in zip(answers[_OURS], answers[_LOOP], strict=True))
    num_pictures = len({item.image_key for item in items})
    report.facts[f"{name}: same answers"] = (
        f"{same} of {len(items)} ({num_pictures} pictures)"
    )


@torch.inference_mode()
def llava_loop(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    task: Task,
    items: Sequence[TaskItem],
) -> list[str]:
    """One question at a time, its picture encoded each time, by the stock ``generate``."""
    answers = []
    for item in items:
        content = [{"type": "image"}, {"type": "text", "text": task.prompt(item)}]
        messages: list[Any] = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        picture = task.open_image(str(item.image_key))
        inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers
