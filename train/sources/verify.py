"""Decoding every picture once, before a run: a damaged one must not end it in the third hour."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from mllm.cache import cache_dir
from train.sources.pictures import Picture
from vision_moe import InputError, atomic_write_text


def unreadable_pictures(pictures: Sequence[Picture]) -> dict[int, str]:
    """Numbers of the pictures that cannot be decoded, each with its fault.

    What was found is kept in the cache under the pictures' identities, so that a data set is
    decoded once and not once a run.
    """
    digest = hashlib.sha256("\n".join(one.identity() for one in pictures).encode()).hexdigest()
    path = cache_dir() / "verified" / f"{digest}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {int(number): str(fault) for number, fault in known.items()}
    except (OSError, ValueError, AttributeError):  # not there yet, or damaged
        pass
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = pool.map(decoding_fault, pictures, chunksize=16)
        bar = tqdm(faults, total=len(pictures), desc="verifying pictures", unit="img", delay=2)
        found = {number: fault for number, fault in enumerate(bar) if fault is not None}
    atomic_write_text(path, json.dumps(found))
    return found


def decoding_fault(picture: Picture) -> str | None:
    """What is wrong with a picture when it is decoded to its end, or ``None``."""
    try:
        picture.open()
    except InputError as error:
        return str(error)
    return None
