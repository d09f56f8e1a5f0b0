"""``mllm inspect --data``: from a checkpoint to a table, two pictures and the numbers."""

from __future__ import annotations

import json
from pathlib import Path

from mllm.clip_evaluation import load_clip
from mllm.diagnosis.data import read_diagnostic_data, scenes_data
from mllm.diagnosis.measure import diagnose
from mllm.diagnosis.plots import draw_diagnosis, draw_patches
from mllm.diagnosis.table import diagnosis_table
from vision_moe import InputError, atomic_write_text

SCENES = "scenes"


def diagnose_checkpoint(
    checkpoint: str | Path,
    data: str,
    picture: Path,
    image_folder: str | None = None,
    split: str | None = None,
    control: str | Path | None = None,
) -> tuple[str, list[Path]]:
    """Diagnose a CLIP-MoE and write what is found beside ``picture``.

    Args:
        checkpoint: CLIP-MoE folder.
        data: ``scenes``, or a file of captions.
        picture: The picture of ``mllm inspect``; its name begins those of the files.
        image_folder: Where the pictures' paths start.
        split: Of the file.
        control: A CLIP-MoE of models that differ in their seeds alone.

    Returns:
        The table, and the files: the numbers as pictures, the patches, and the numbers as JSON.
    """
    clip = load_clip(checkpoint)
    if data == SCENES:
        size = clip.config.vision_config.image_size
        if not isinstance(size, int):
            raise InputError("scenes are square, but the model takes other pictures")
        pairs = scenes_data(size)
    else:
        folder = Path(image_folder) if image_folder else None
        pairs = read_diagnostic_data(Path(data), folder, split)
    diagnosis = diagnose(clip, pairs, load_clip(control) if control else None)
    title = Path(checkpoint).resolve().name
    files = [
        picture.with_name(f"{picture.stem}-{what}{suffix}")
        for what, suffix in (
            ("diagnosis", picture.suffix), ("patches", picture.suffix), ("diagnosis", ".json"),
        )
    ]  # fmt: skip
    draw_diagnosis(diagnosis, title, files[0])
    draw_patches(clip, pairs, title, files[1])
    atomic_write_text(files[2], json.dumps(diagnosis.as_json(), indent=2) + "\n")
    return diagnosis_table(diagnosis), files
