"""All pictures of a data set, rendered by every core and kept in the cache as one array."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from joblib import Parallel, delayed
from tqdm import tqdm

from mllm.cache import cache_dir
from mllm.scenes.dataset import ScenesDataset
from vision_moe import InputError

_CHUNK = 250
#: Seconds that renderers wait for more to do; a process that started them cannot end before.
_IDLE = 2
_NUM_PROBES = 8


def render_pictures(dataset: ScenesDataset) -> np.ndarray:
    """``(M, H, W, 3)`` uint8, memory-mapped from the cache; rendered first if need be."""
    path = cache_dir() / "scenes" / f"{_key(dataset)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _render_all(dataset, path)
    return np.load(path, mmap_mode="r")


def _key(dataset: ScenesDataset) -> str:
    # A few pictures stand for the code that draws scenes and renders them: when it changes, so do
    # they, and older caches are left alone.
    probes = hashlib.sha256()
    for index in range(min(_NUM_PROBES, len(dataset))):
        probes.update(dataset[index].image.tobytes())
    described = {
        "probes": probes.hexdigest(),
        "world": asdict(dataset.world),
        "split": dataset.split,
        "length": len(dataset),
        "seed": dataset.seed,
        "image_size": dataset.image_size,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]


def _render_all(dataset: ScenesDataset, path: Path) -> None:
    side = dataset.image_size
    aside = path.with_suffix(".unfinished")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(dataset), side, side, 3)}
    starts = range(0, len(dataset), _CHUNK)
    num_jobs = -1 if len(starts) > 1 else 1
    chunks = Parallel(num_jobs, return_as="generator", idle_worker_timeout=_IDLE)(
        delayed(partial(_render_chunk, dataset))(start) for start in starts
    )
    # Written, not mapped: a full disk then is an error and not the death of the process.
    try:
        with (
            aside.open("wb") as file,
            tqdm(total=len(dataset), desc="rendering scenes", unit="scene", delay=1) as bar,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk.tobytes())
                bar.update(len(chunk))
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason})") from error


def _render_chunk(dataset: ScenesDataset, start: int) -> np.ndarray:
    stop = min(start + _CHUNK, len(dataset))
    return np.stack([np.asarray(dataset[index].image) for index in range(start, stop)])
