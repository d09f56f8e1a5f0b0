"""``mllm check-data``: every fault of a data set, before a run stumbles over it."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from train.sources.conversations import RecordFault, parse_record
from train.sources.pictures import Picture, PictureBytes, header_fault
from train.sources.records import PictureFolder, Record, read_records
from train.sources.verify import decoding_fault

_CHUNK = 1024
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


@dataclass
class DataCheck:
    """What was found.

    Attributes:
        num_records: All of them.
        num_faulty: Those with a fault.
        num_pictures: Distinct pictures that records name.
        num_pictures_of_records: How many records have how many pictures.
    """

    num_records: int = 0
    num_faulty: int = 0
    num_pictures: int = 0
    num_pictures_of_records: Counter[int] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line: records, pictures, faults."""
        kinds = ", ".join(
            f"{count:,} with {number} picture{'' if number == 1 else 's'}"
            for number, count in sorted(self.num_pictures_of_records.items())
        )
        return (
            f"{self.num_records:,} records ({kinds or 'none that is whole'}),"
            f" {self.num_pictures:,} distinct pictures, {self.num_faulty:,} faulty records"
        )


def check_data(
    path: str,
    image_folder: str | None = None,
    decode: bool = False,
    allow_outside: bool = False,
    container: str | None = None,
    found: DataCheck | None = None,
) -> Iterator[str]:
    """Yield ``file, record: fault`` for each record that training would leave out.

    Args:
        path: The file; with ``*`` or ``{000..123}`` several.
        image_folder: Where relative picture paths start; the file's own folder by default.
        decode: Decode every picture to its end; else its header alone is read.
        allow_outside: Pictures may lie outside of the folder.
        container: How the file is read; by its name by default.
        found: Is counted up on the way.

    Raises:
        InputError: There is no such file, or none of its records can be read.
    """
    found = DataCheck() if found is None else found
    folder = PictureFolder(image_folder or str(Path(path).parent), allow_outside)
    records = read_records(path, container)
    known: dict[Picture, str | None] = {}
    check_picture = decoding_fault if decode else header_fault
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=1.0, desc=f"checking {Path(path).name}", delay=2, bar_format=_BAR) as bar,
    ):
        while chunk := list(islice(records, _CHUNK)):
            parsed = [_parse(record, folder) for record in chunk]
            new = {p for _, pictures in parsed for p in pictures if p not in known}
            # Decoders run beside each other; reading a header is too little work to hand over.
            known.update(zip(new, (pool.map if decode else map)(check_picture, new), strict=True))
            for record, (fault, pictures) in zip(chunk, parsed, strict=True):
                found.num_records += 1
                faults = [fault] if fault else []
                faults += [known_fault for p in pictures if (known_fault := known[p]) is not None]
                if faults:
                    found.num_faulty += 1
                    yield f"{record.where}: {'; '.join(faults)}"
                else:
                    found.num_pictures_of_records[len(pictures)] += 1
            found.num_pictures += len(new)
            # Bytes are not kept: a data set of them may be larger than the memory.
            for picture in new:
                if isinstance(picture, PictureBytes):
                    del known[picture]
            bar.update(chunk[-1].share - bar.n)


def _parse(record: Record, folder: PictureFolder) -> tuple[str | None, list[Picture]]:
    if record.fault is not None:
        return record.fault, []
    try:
        conversation = parse_record(record.value)
        return None, [folder.find(image, record) for image in conversation.images]
    except RecordFault as fault:
        return str(fault), []
