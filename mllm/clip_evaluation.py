"""Evaluation of CLIPs themselves: retrieval and zero-shot classification, several side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vision_moe
from mllm.versions import library_versions
from vision_moe import (
    CLIPMoEModel,
    ImageFeatures,
    InputError,
    atomic_write_text,
    encode_images,
    encode_texts,
    open_image,
    sha256_file,
    writable_folder,
)


@dataclass(frozen=True)
class CLIPEvaluationConfig:
    """What is chosen in an evaluation of CLIPs.

    Attributes:
        data: ``retrieval``: the file that lists captions, see :mod:`vision_moe.caption_sets`;
            ``zero_shot``: a folder with one folder a class.
        image_folder: ``retrieval``: where the pictures' paths start; the file's folder by default.
        split: ``retrieval``: ``all`` or a split of the file; ``test`` by default where it has any.
        templates: ``zero_shot``: ``openai`` (80) or ``simple`` (7).
        class_names: ``zero_shot``: JSON ``{folder name: class name}``.
        batch_size: Pictures at a time.
        bf16: Autocast to bfloat16.
    """

    data: str
    image_folder: str | None = None
    split: str | None = None
    templates: str = "openai"
    class_names: str | None = None
    batch_size: int = 64
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"the batch size is {self.batch_size} and must be at least 1")


@dataclass(frozen=True)
class CLIPEvaluation:
    """``scores.json`` and the lines of ``predictions.jsonl``."""

    scores: dict[str, Any]
    predictions: list[dict[str, Any]]

    def save(self, folder: str | Path) -> None:
        """Write both files; the scores come last, so that where they are, all is."""
        folder = writable_folder(folder)
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in self.predictions]
        atomic_write_text(folder / "predictions.jsonl", "".join(lines))
        scores = json.dumps(self.scores, indent=2, ensure_ascii=False) + "\n"
        atomic_write_text(folder / "scores.json", scores)


#: What a task finds out of one model: its metrics, a line for each query, and what was skipped.
_Findings = tuple[dict[str, float], list[dict[str, Any]], dict[str, str]]


def evaluate_clips(
    models: Sequence[str | Path],
    task: str,
    config: CLIPEvaluationConfig,
    out: str | Path | None = None,
    progress: bool = True,
) -> list[CLIPEvaluation]:
    """Evaluate CLIPs on the same data.

    Args:
        models: CLIP folders, dense or MoE, or open_clip's ``NAME:PRETRAINED``.
        task: ``retrieval`` or ``zero_shot``.
        config: What is chosen.
        out: Folder for the results: of one model, or of each in a folder of its name.
        progress: Bars on stderr.

    Raises:
        InputError: A model or the data cannot be read.
    """
    names = _folder_names(models)
    folders = [] if out is None else [Path(out)] if len(models) == 1 else [
        Path(out) / name for name in names
    ]  # fmt: skip
    for folder in folders:
        writable_folder(folder)
    measure, details = _TASKS[task](config, progress)
    evaluations = []
    for number, checkpoint in enumerate(models):
        clip = load_clip(checkpoint)
        autocast = (
            torch.autocast(clip.device.type, torch.bfloat16) if config.bf16 else nullcontext()
        )
        with autocast:
            metrics, predictions, skipped = measure(clip)
        scores = {
            "task": task,
            "metrics": metrics,
            "n": len(predictions),
            "checkpoint": str(checkpoint),
            "prompt": details.get("templates"),
            "seed": None,  # nothing is drawn
            "versions": library_versions(),
            "skipped": skipped,
            "config": {
                **asdict(config),
                **details,
                "dtype": str(clip.dtype).removeprefix("torch."),
                "device": clip.device.type,
                "preprocess": clip.config.preprocess,
            },
        }
        evaluations.append(CLIPEvaluation(scores, predictions))
        if folders:
            evaluations[-1].save(folders[number])
    return evaluations


def load_clip(checkpoint: str | Path) -> CLIPMoEModel:
    """A CLIP folder, or open_clip's ``NAME:PRETRAINED``; on the GPU if there is one."""
    name, colon, pretrained = str(checkpoint).partition(":")
    if colon and not Path(checkpoint).exists():
        try:
            clip = CLIPMoEModel.from_open_clip(name, pretrained)
        except RuntimeError as error:
            raise InputError(f"{checkpoint}: {error}") from error
    else:
        clip = vision_moe.load(checkpoint)
    clip.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    return clip


def _folder_names(models: Sequence[str | Path]) -> list[str]:
    names = [Path(model).resolve().name.replace(":", "-") for model in models]
    return [
        name if names.count(name) == 1 else f"{number}-{name}"
        for number, name in enumerate(names, start=1)
    ]


def _openers(images: Iterable[Path]) -> list[Callable[[], Image.Image]]:
    return [partial(open_image, path) for path in images]


def _retrieval(
    config: CLIPEvaluationConfig, progress: bool
) -> tuple[Callable[[CLIPMoEModel], _Findings], dict[str, Any]]:
    path = Path(config.data)
    folder = Path(config.image_folder) if config.image_folder else None
    captions = vision_moe.read_caption_set(path, folder, config.split)
    image_of_caption = torch.tensor(captions.image_of_caption)

    def measure(clip: CLIPMoEModel) -> _Findings:
        images = encode_images(clip, _openers(captions.images), config.batch_size, progress)
        kept = torch.isin(image_of_caption, images.numbers).nonzero().flatten()
        texts = encode_texts(clip, [captions.captions[i] for i in kept.tolist()], progress=progress)
        own = torch.searchsorted(images.numbers, image_of_caption[kept])
        ranks = vision_moe.retrieval_ranks(images.features, texts, own)
        predictions = [
            {"direction": "i2t", "image": str(captions.images[number]), "rank": rank}
            for number, rank in zip(images.numbers.tolist(), ranks.i2t.tolist(), strict=True)
        ]
        predictions += [
            {
                "direction": "t2i",
                "image": str(captions.images[captions.image_of_caption[number]]),
                "caption": captions.captions[number],
                "rank": rank,
            }
            for number, rank in zip(kept.tolist(), ranks.t2i.tolist(), strict=True)
        ]
        return ranks.recall(), predictions, _named(captions.images, images)

    details = {
        "data_sha256": sha256_file(path),
        "num_images": len(captions.images),
        "num_captions": len(captions.captions),
        "splits": captions.splits,
    }
    return measure, details


def _zero_shot(
    config: CLIPEvaluationConfig, progress: bool
) -> tuple[Callable[[CLIPMoEModel], _Findings], dict[str, Any]]:
    names = Path(config.class_names) if config.class_names else None
    folder = vision_moe.read_class_folder(Path(config.data), names)
    labels = torch.tensor(folder.labels)

    def measure(clip: CLIPMoEModel) -> _Findings:
        classes = vision_moe.class_features(clip, folder.classes, config.templates, progress)
        images = encode_images(clip, _openers(folder.images), config.batch_size, progress)
        own = labels[images.numbers]
        metrics = vision_moe.zero_shot_metrics(images.features, classes, own)
        ranks = vision_moe.zero_shot_ranks(images.features, classes, own).tolist()
        best = (images.features @ classes.T).argmax(1).tolist()
        predictions = [
            {
                "image": str(folder.images[number]),
                "class": folder.classes[folder.labels[number]],
                "predicted": folder.classes[guess],
                "rank": rank,
            }
            for number, guess, rank in zip(images.numbers.tolist(), best, ranks, strict=True)
        ]
        return metrics, predictions, _named(folder.images, images)

    return measure, {"num_images": len(folder.images), "num_classes": len(folder.classes)}


_TASKS = {"retrieval": _retrieval, "zero_shot": _zero_shot}
CLIP_TASKS = tuple(_TASKS)


def _named(paths: Sequence[Path], images: ImageFeatures) -> dict[str, str]:
    return {str(paths[number]): reason for number, reason in images.skipped.items()}


def comparison_table(evaluations: Sequence[CLIPEvaluation]) -> str:
    """A row for each model, a column for each metric, percentages."""
    first = evaluations[0].scores
    config = first["config"]
    if first["task"] == "retrieval":
        split = f", split {config['split']}" if config["split"] else ""
        size = f"{config['num_images']:,} pictures, {config['num_captions']:,} captions{split}"
    else:
        size = f"{config['num_images']:,} pictures, {config['num_classes']:,} classes"
    metrics = list(first["metrics"])
    names = [str(one.scores["checkpoint"]) for one in evaluations]
    width = max(map(len, names))
    columns = [f"{metric.replace('_r', ' R@').replace('_', ' '):>9}" for metric in metrics]
    lines = [f"{first['task']}: {size}, in %", f"{'':<{width}}  {'  '.join(columns)}"]
    for name, one in zip(names, evaluations, strict=True):
        values = [
            f"{100 * one.scores['metrics'][metric]:>{max(9, len(column))}.1f}"
            for metric, column in zip(metrics, columns, strict=True)
        ]
        lines.append(f"{name:<{width}}  {'  '.join(values)}")
    for name, one in zip(names, evaluations, strict=True):
        if skipped := one.scores["skipped"]:
            lines.append(f"{name}: {len(skipped)} pictures could not be read (see scores.json)")
    return "\n".join(lines)
