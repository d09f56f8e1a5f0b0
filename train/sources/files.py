"""Instruction samples from the user's own records: JSON, Parquet, WebDataset, streams."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from train.instruction_rows import InstructionSample
from train.recipe import InstructionSource
from train.sources.base import InstructionData, draw
from train.sources.conversations import RecordFault, parse_record
from train.sources.pictures import Picture, PictureBytes
from train.sources.records import (
    PictureFolder,
    Record,
    read_records,
    stream_records,
)
from train.sources.verify import unreadable_pictures
from vision_moe import InputError

# Their pictures are copied into the cache while they are read, so only what is wanted is read.
_READ_IN_ORDER = ("parquet", "datasets")


def record_files(source: InstructionSource, seed: int) -> InstructionData:
    """Samples of a source whose records are the user's; those with a fault are left out.

    Raises:
        InputError: A file is missing, or more than 1 % of its records have a fault.
    """
    if source.path is None:
        raise InputError(f"data source '{source.name}': 'path' is missing")
    data = InstructionData([], [], [])
    folder = PictureFolder(
        source.image_folder or str(Path(source.path).parent), source.allow_outside
    )
    keys: dict[Picture, int] = {}
    with tqdm(total=1.0, desc=f"reading {source.path}", delay=2, bar_format=_BAR) as bar:
        for record in _records(source):
            bar.update(record.share - bar.n)
            data.skipped.num_seen += 1
            try:
                data.samples.append(_sample(record, folder, keys))
            except RecordFault as fault:
                data.skipped.faults.append(f"{record.where}: {fault}")
    if not data.skipped.num_seen:
        raise InputError(f"{source.path}: holds no records")
    data.skipped.enforce_limit()
    if source.name not in _READ_IN_ORDER:
        data.samples[:] = draw(data.samples, source.num_images, [seed])
    _leave_out_unreadable(data, list(keys))
    data.open_images.extend(picture.open for picture in keys)
    data.image_identities.extend(picture.identity() for picture in keys)
    return data


def _leave_out_unreadable(data: InstructionData, pictures: Sequence[Picture]) -> None:
    """Drop the samples whose pictures cannot be decoded."""
    used = sorted({key for sample in data.samples for key in sample.image_keys})
    found = unreadable_pictures([pictures[key] for key in used])
    faults = {used[number]: fault for number, fault in found.items()}
    kept = []
    for sample in data.samples:
        fault = next((faults[key] for key in sample.image_keys if key in faults), None)
        if fault is None:
            kept.append(sample)
        else:
            data.skipped.faults.append(f"{sample.source}: {fault}")
    data.samples[:] = kept
    data.skipped.enforce_limit()


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def _records(source: InstructionSource) -> Iterator[Record]:
    assert source.path is not None
    if source.name == "datasets":
        return stream_records(source.path, source.split, source.num_images)
    container = "json" if source.name in ("llava_json", "jsonl") else source.name
    records = read_records(source.path, container)
    return islice(records, source.num_images) if source.name in _READ_IN_ORDER else records


def _sample(record: Record, folder: PictureFolder, keys: dict[Picture, int]) -> InstructionSample:
    """The record as a sample; new pictures get the next number in ``keys``."""
    if record.fault is not None:
        raise RecordFault(record.fault)
    conversation = parse_record(record.value)
    pictures = [folder.find(image, record) for image in conversation.images]
    kept = [one.kept() if isinstance(one, PictureBytes) else one for one in pictures]
    return InstructionSample(
        image_keys=tuple(keys.setdefault(picture, len(keys)) for picture in kept),
        turns=conversation.turns,
        is_dialogue=True,
        system=conversation.system,
        source=record.where,
    )
