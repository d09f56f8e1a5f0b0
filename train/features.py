"""Features of a frozen vision tower, computed once for each picture and kept on disk.

The file stands in the cache under a hash of all that its content depends on: the tower's weights
and configuration, the preprocessing and the pictures.

n pictures, N tokens of a picture, V width of the tower.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from mllm.cache import cache_dir
from vision_moe import atomic_directory

_FILE = "features.npy"


def cached_features(
    tower: PreTrainedModel,
    image_processor: Any,
    open_images: Sequence[Callable[[], Image.Image]],
    image_identities: Sequence[str],
    layer: int = -2,
    drop_first: bool = True,
    dtype: str = "float16",
    batch_size: int = 64,
    cache: Path | None = None,
) -> np.ndarray:
    """Hidden states of a layer for every picture, from the cache where they are known.

    Args:
        tower: Any Hugging Face vision model with ``hidden_states``, in evaluation mode.
        image_processor: Makes its ``pixel_values``.
        open_images: n functions that open the pictures.
        image_identities: n strings; equal strings are equal pictures.
        layer: Of ``hidden_states``.
        drop_first: Leave the first token (CLS) out.
        dtype: ``float16`` or ``float32``, of the file.
        batch_size: Pictures at once.
        cache: Folder of the cache; the user's by default.

    Returns:
        ``(n, N, V)``, memory-mapped for reading.
    """
    root = (cache or cache_dir()) / "features"
    root.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {
        "tower": tower_hash(tower),
        "image_processor": json.loads(image_processor.to_json_string()),
        "layer": layer,
        "drop_first": drop_first,
        "dtype": dtype,
        "images": list(image_identities),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = root / key
    if not folder.is_dir():
        # Another process that wants the same waits, and then finds it.
        with FileLock(root / f"{key}.lock"):
            if not folder.is_dir():
                encoded = _encode(
                    tower, image_processor, open_images, layer, drop_first, batch_size
                )
                # Closed, its progress bar too, where it cannot be written to the end.
                with atomic_directory(folder) as aside, closing(encoded) as batches:
                    _write(aside / _FILE, batches, len(open_images), np.dtype(dtype))
    features: np.ndarray = np.load(folder / _FILE, mmap_mode="r")
    return features


def tower_hash(tower: PreTrainedModel) -> str:
    """Hash of a model's configuration and weights."""
    digest = hashlib.sha256(type(tower).__name__.encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    # Settings that leave no trace in the weights (activation, top-k) change the features too.
    config = tower.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@torch.no_grad()
def _encode(
    tower: PreTrainedModel,
    image_processor: Any,
    open_images: Sequence[Callable[[], Image.Image]],
    layer: int,
    drop_first: bool,
    batch_size: int,
) -> Generator[Tensor, None, None]:
    """Yield ``(b, N, V)`` for one batch of pictures after another."""
    weight = next(tower.parameters())
    with tqdm(total=len(open_images), desc="tower features", unit="img", mininterval=0.5) as bar:
        for start in range(0, len(open_images), batch_size):
            images = [open_one() for open_one in open_images[start : start + batch_size]]
            pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
            output = tower(pixels.to(weight.device, weight.dtype), output_hidden_states=True)
            yield output.hidden_states[layer][:, int(drop_first) :]
            bar.update(len(images))


def _write(path: Path, batches: Iterable[Tensor], num_images: int, dtype: np.dtype[Any]) -> None:
    """An ``.npy`` file, written front to back: a full disk is then an error, where a memory map
    would be killed by a signal."""
    with path.open("wb") as file:
        for number, batch in enumerate(batches):
            values = batch.float().cpu().numpy().astype(dtype)
            if number == 0:
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (num_images, *values.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(file, header)
            file.write(values.tobytes())
