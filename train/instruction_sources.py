"""Instruction samples of all the sources of a recipe."""

import dataclasses
from collections.abc import Callable, Sequence

from train.recipe import InstructionSource
from train.sources.base import InstructionData
from train.sources.builtin import easy_vqa, scenes_captions, scenes_questions
from train.sources.files import record_files


def load_sources(sources: Sequence[InstructionSource], seed: int) -> InstructionData:
    """Read every source of a recipe and join them.

    Args:
        sources: As in the recipe.
        seed: Of scenes, and of what is drawn from larger sources.

    Raises:
        InputError: A file is missing, or too many records of one are wrong; the message names the
            file, the record and the fault.
    """
    data = InstructionData([], [], [])
    for number, source in enumerate(sources):
        part = READERS[source.name](source, seed)
        # Pictures of no sample get no number: nothing is computed of them.
        used = sorted({key for sample in part.samples for key in sample.image_keys})
        number_of = {key: len(data.open_images) + place for place, key in enumerate(used)}
        data.samples.extend(
            dataclasses.replace(
                one,
                image_keys=tuple(number_of[key] for key in one.image_keys),
                source_number=number,
            )
            for one in part.samples
        )
        data.open_images.extend(part.open_images[key] for key in used)
        data.image_identities.extend(part.image_identities[key] for key in used)
        data.skipped.num_seen += part.skipped.num_seen or len(part.samples)
        data.skipped.faults.extend(part.skipped.faults)
    return data


READERS: dict[str, Callable[[InstructionSource, int], InstructionData]] = {
    "scenes_captions": scenes_captions,
    "scenes_questions": scenes_questions,
    "easy_vqa": easy_vqa,
    "llava_json": record_files,
    "jsonl": record_files,
    "parquet": record_files,
    "webdataset": record_files,
    "datasets": record_files,
}
