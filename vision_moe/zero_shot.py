"""Zero-shot classification of a folder of pictures, with open_clip's class names and templates.

N pictures, C classes, P dimensions of the common space.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from open_clip import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
    build_zero_shot_classifier,
)
from torch import Tensor

from vision_moe.errors import InputError
from vision_moe.modeling import CLIPMoEModel

TEMPLATES = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class ClassFolder:
    """Pictures in one folder a class.

    Attributes:
        classes: Names as the text tower reads them, in the order of the folders' names.
        images: Of all classes.
        labels: The number of each picture's class.
    """

    classes: list[str]
    images: list[Path]
    labels: list[int]


def read_class_folder(folder: Path, class_names: Path | None = None) -> ClassFolder:
    """Find the pictures below a folder.

    Args:
        folder: Holds one folder for each class.
        class_names: A JSON file ``{folder name: class name}``.  Without it the folders' names are
            the classes', ``_`` read as a space; and a thousand folders named by WordNet numbers,
            such as n01440764, are ImageNet's classes, under open_clip's names for them.

    Raises:
        InputError: There are fewer than two classes, no pictures, or a class without a name.
    """
    try:
        folders = sorted(one for one in folder.iterdir() if one.is_dir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error})") from error
    if len(folders) < 2:
        raise InputError(f"{folder}: holds {len(folders)} folders, one for each class is wanted")
    images, labels = [], []
    for label, one in enumerate(folders):
        found = sorted(path for path in one.rglob("*") if path.suffix.lower() in _SUFFIXES)
        images += found
        labels += [label] * len(found)
    if not images:
        raise InputError(f"{folder}: there are no pictures in its folders")
    return ClassFolder(_names([one.name for one in folders], class_names), images, labels)


def _names(folders: list[str], class_names: Path | None) -> list[str]:
    if class_names is None:
        if all(re.fullmatch(r"n\d{8}", name) for name in folders):
            if len(folders) != len(IMAGENET_CLASSNAMES):
                raise InputError(
                    f"{len(folders)} folders are named by WordNet numbers: only ImageNet's 1,000"
                    " together are known; a JSON file {folder name: class name} names others"
                )
            return list(IMAGENET_CLASSNAMES)  # in the order of the WordNet numbers
        return [name.replace("_", " ") for name in folders]
    try:
        content = json.loads(class_names.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{class_names}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{class_names}: not a JSON object {{folder name: class name}}")
    for name in folders:
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise InputError(f"{class_names}: has no class name for the folder '{name}'")
    return [content[name] for name in folders]


@torch.inference_mode()
def class_features(
    model: CLIPMoEModel, classes: list[str], templates: str = "openai", progress: bool = True
) -> Tensor:
    """A unit vector for each class: the mean over the templates, ``(C, P)`` fp32 on the CPU."""
    if templates not in TEMPLATES:
        raise InputError(f"there are no templates '{templates}', only {', '.join(TEMPLATES)}")
    weights: Tensor = build_zero_shot_classifier(
        model,
        model.tokenizer,
        classes,
        TEMPLATES[templates],
        num_classes_per_batch=10,
        device=model.device,
        use_tqdm=progress,
    )
    return weights.T.float().cpu()


def zero_shot_metrics(image_features: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies, 0 to 1; a class that ties with the right one counts as ahead of it.

    Args:
        image_features: ``(N, P)``, of any norm.
        classes: ``(C, P)``, normalised.
        labels: ``(N,)``.

    Returns:
        ``accuracy_1``, ``accuracy_5`` and ``mean_class_accuracy``, the mean of the classes' own.
    """
    ranks = zero_shot_ranks(image_features, classes, labels)
    first = (ranks == 0).double()
    count = torch.bincount(labels, minlength=len(classes))
    right = torch.bincount(labels, first, minlength=len(classes))
    return {
        "accuracy_1": first.mean().item(),
        "accuracy_5": (ranks < 5).double().mean().item(),
        "mean_class_accuracy": (right[count > 0] / count[count > 0]).mean().item(),
    }


def zero_shot_ranks(image_features: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """``(N,)``: how many other classes come before each picture's own."""
    similarity = image_features @ classes.T                                     # (N, C)
    own = similarity.gather(1, labels[:, None])
    return (similarity >= own).sum(1) - 1
