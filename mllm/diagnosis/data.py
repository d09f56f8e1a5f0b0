"""Pictures and captions for a diagnosis, with what is known of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mllm.scenes import FACTORS, ScenesDataset, SceneWorld, detailed_caption
from vision_moe import InputError, open_image, read_caption_set

NUM_SCENES = 500
_MAIN_FACTORS = ("shape", "color", "texture", "size", "place")


@dataclass(frozen=True)
class DiagnosticData:
    """What experts are tried on.

    Attributes:
        name: Of the data.
        pictures: Each opens one.
        captions: Of all pictures.
        image_of_caption: The number of each caption's picture.
        negatives: For each attribute, captions of pictures with only that attribute changed, and
            the number of the caption that was.
        factors: For each factor the value that each picture has, or ``None``.
        skipped: Why each picture that could not be read was left out, by its name.
    """

    name: str
    pictures: list[Callable[[], Image.Image]]
    captions: list[str]
    image_of_caption: list[int]
    negatives: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    factors: dict[str, list[str | None]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def scenes_data(image_size: int, num_scenes: int = NUM_SCENES, seed: int = 0) -> DiagnosticData:
    """Rendered scenes of the test split, whose factors are known."""
    scenes = ScenesDataset(SceneWorld(), "test", num_scenes, seed, image_size)
    samples = [scenes[index] for index in range(num_scenes)]
    negatives: dict[str, list[tuple[int, str]]] = {}
    for factor in FACTORS:
        rng = np.random.default_rng([seed, FACTORS.index(factor)])
        for number, sample in enumerate(samples):
            changed = scenes.world.hard_negative(sample.scene, factor, rng)
            if changed is not None and detailed_caption(changed) != sample.detailed_caption:
                negatives.setdefault(factor, []).append((number, detailed_caption(changed)))
    factors: dict[str, list[str | None]] = {
        name: [str(getattr(sample.scene.main, name)) for sample in samples]
        for name in _MAIN_FACTORS
    }
    factors["background"] = [sample.scene.background for sample in samples]
    factors["count"] = [str(len(sample.scene.objects)) for sample in samples]
    return DiagnosticData(
        f"{num_scenes} rendered scenes, seed {seed}",
        [partial(getattr, sample, "image") for sample in samples],
        [sample.detailed_caption for sample in samples],
        list(range(num_scenes)),
        negatives,
        factors,
    )


def read_diagnostic_data(
    path: Path, image_folder: Path | None = None, split: str | None = None
) -> DiagnosticData:
    """Any file of captions that :mod:`vision_moe.caption_sets` reads.

    Lines of JSONL may add ``factors``, such as ``{"color": "red"}``, and ``negatives``: for each
    attribute the line's first caption with that attribute changed.  Pictures that cannot be read
    are left out, with all that belongs to them.

    Raises:
        InputError: The file is damaged, holds fewer than ten pictures, or more than one in a
            hundred cannot be read.
    """
    captions = read_caption_set(path, image_folder, split)
    if len(captions.images) < 10:
        raise InputError(f"{path}: {len(captions.images)} pictures; a diagnosis needs at least 10")
    data = DiagnosticData(
        path.name,
        [partial(open_image, image) for image in captions.images],
        captions.captions,
        captions.image_of_caption,
    )
    first_caption: dict[int, int] = {}
    for number, image in enumerate(captions.image_of_caption):
        first_caption.setdefault(image, number)
    numbers = {str(image): number for number, image in enumerate(captions.images)}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break  # not JSONL
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            break
        image_number = numbers.get(str((image_folder or path.parent) / record["image"]))
        if image_number is None:  # of another split
            continue
        where = f"{path}, line {number}"
        for attribute, caption in _strings(record, "negatives", where).items():
            pair = (first_caption[image_number], caption)
            data.negatives.setdefault(attribute, []).append(pair)
        for factor, value in _strings(record, "factors", where).items():
            values = data.factors.setdefault(factor, [None] * len(captions.images))
            values[image_number] = value
    return _readable(data, captions.images)


def _readable(data: DiagnosticData, images: Sequence[Path]) -> DiagnosticData:
    """The data without the pictures that cannot be read."""
    skipped: dict[int, str] = {}
    bar = tqdm(data.pictures, desc="reading pictures", unit="picture", delay=2)
    for number, picture in enumerate(bar):
        try:
            picture()
        except InputError as error:
            skipped[number] = str(error)
    if not skipped:
        return data
    if len(skipped) > len(images) // 100:
        raise InputError(
            f"{data.name}: {len(skipped)} of {len(images)} pictures cannot be read, more than one"
            f" in a hundred: {next(iter(skipped.values()))}"
        )
    images_kept = [number for number in range(len(images)) if number not in skipped]
    image_now = {number: now for now, number in enumerate(images_kept)}
    captions_kept = [n for n, image in enumerate(data.image_of_caption) if image in image_now]
    caption_now = {number: now for now, number in enumerate(captions_kept)}
    negatives = {
        attribute: [(caption_now[n], changed) for n, changed in pairs if n in caption_now]
        for attribute, pairs in data.negatives.items()
    }
    return DiagnosticData(
        data.name,
        [data.pictures[number] for number in images_kept],
        [data.captions[number] for number in captions_kept],
        [image_now[data.image_of_caption[number]] for number in captions_kept],
        {attribute: pairs for attribute, pairs in negatives.items() if pairs},
        {name: [values[n] for n in images_kept] for name, values in data.factors.items()},
        {str(images[number]): reason for number, reason in skipped.items()},
    )


def _strings(record: dict[str, object], key: str, where: str) -> dict[str, str]:
    value = record.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise InputError(f"{where}: '{key}' must be an object of texts")
    return value
