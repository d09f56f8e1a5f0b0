"""Features of a frozen vision tower: computed when a picture is first asked for, kept on disk.

A folder of the cache stands for all that features depend on but the picture: the tower's weights
and configuration, the preprocessing, the layer, the number formats. Each picture has an entry of
its own there, so that other data with some of the same pictures find those.

n pictures, I of a batch, N tokens of a picture, V width of the tower.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from mllm.cache import cache_dir
from mllm.mapped_files import release_file_pages
from train.feature_files import FeatureFiles

logger = logging.getLogger(__name__)

_BATCH_SIZE = 64


class TowerFeatures:
    """Hidden states of a layer for any of n pictures; ``image_features`` of a training step.

    A picture that is not known yet is encoded when it is asked for, as a run without a cache would
    in each epoch: nothing waits for pictures that are never used.

    Args:
        tower: Any Hugging Face vision model with ``hidden_states``; it must not change any more.
        image_processor: Makes its ``pixel_values``.
        open_images: n functions that open the pictures.
        image_identities: n strings; equal strings are equal pictures.
        layer: Of ``hidden_states``.
        drop_first: Leave the first token (CLS) out.
        dtype: ``float16`` or ``float32``, of the files.
        bf16: Encode under bf16 autocast.
        cache: Folder of the cache; the user's by default.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        image_processor: Any,
        open_images: Sequence[Callable[[], Image.Image]],
        image_identities: Sequence[str],
        layer: int = -2,
        drop_first: bool = True,
        dtype: str = "float16",
        bf16: bool = False,
        cache: Path | None = None,
    ) -> None:
        self.tower = tower
        self.image_processor = image_processor
        self.open_images = open_images
        self.layer = layer
        self.drop_first = drop_first
        self.bf16 = bf16
        self._names = [FeatureFiles.name(identity) for identity in image_identities]
        self._dtype = dtype
        self._shape = self._encode([Image.new("RGB", (32, 32))]).shape[1:]
        parts = {
            "tower": tower_hash(tower),
            "image_processor": json.loads(image_processor.to_json_string()),
            "layer": layer,
            "drop_first": drop_first,
            "dtype": dtype,
            "bf16": bf16,
            "shape": self._shape,
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        folder = (cache or cache_dir()) / "features" / key
        release_file_pages(tower.parameters())  # which were read for the hash
        self._files = FeatureFiles(folder, self._shape, dtype)
        self._keeps = True

    def __call__(self, image_keys: Sequence[int]) -> dict[str, Tensor]:
        """``image_features`` ``(I, N, V)``."""
        return {"image_features": torch.from_numpy(self.read(image_keys))}

    def read(self, image_keys: Sequence[int]) -> np.ndarray:
        """``(I, N, V)``, with a progress bar where it takes long."""
        features = np.empty((len(image_keys), *self._shape), np.dtype(self._dtype))
        missing: dict[str, list[int]] = {}
        for number, key in enumerate(image_keys):
            name = self._names[key]
            if name in self._files:
                features[number] = self._files[name]
            else:
                missing.setdefault(name, []).append(number)
        names = list(missing)
        with tqdm(
            total=len(names), desc="tower features", unit="img", delay=5, disable=not names
        ) as bar:
            for start in range(0, len(names), _BATCH_SIZE):
                some = names[start : start + _BATCH_SIZE]
                keys = [image_keys[missing[name][0]] for name in some]
                encoded = self._encode([self.open_images[key]() for key in keys])
                self._keep(some, encoded)
                for name, entry in zip(some, encoded, strict=True):
                    features[missing[name]] = entry
                bar.update(len(some))
        return features

    def read_ahead(self, image_keys: Sequence[int]) -> None:
        """Encode what is missing, without holding it."""
        for start in range(0, len(image_keys), _BATCH_SIZE):
            self.read(image_keys[start : start + _BATCH_SIZE])

    @torch.no_grad()
    def _encode(self, images: list[Image.Image]) -> np.ndarray:
        """``(I, N, V)``"""
        weight = next(self.tower.parameters())
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        was_training = self.tower.training
        self.tower.eval()
        with (
            torch.autocast(weight.device.type, torch.bfloat16, enabled=self.bf16),
            _released_after_use(self.tower),
        ):
            states = self.tower(
                pixels.to(weight.device, weight.dtype), output_hidden_states=True
            ).hidden_states
        self.tower.train(was_training)
        chosen = states[self.layer][:, int(self.drop_first) :]
        encoded: np.ndarray = chosen.float().cpu().numpy().astype(self._dtype)
        return encoded

    def _keep(self, names: Sequence[str], encoded: np.ndarray) -> None:
        if not self._keeps:
            return
        try:
            self._files.add(names, encoded)
        except OSError as error:
            self._keeps = False
            logger.warning(
                "the tower's features are not kept from here on, which makes training slower: %s",
                error,
            )


@contextmanager
def _released_after_use(tower: nn.Module) -> Iterator[None]:
    """What a mapped file holds of each layer leaves the memory when the layer has run: a training
    step has no use for the tower, and needs the memory."""
    with ExitStack() as stack:
        for module in tower.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(_release).remove)
        yield


def _release(layer: nn.Module, *_: Any) -> None:
    release_file_pages(layer.parameters(recurse=False))


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
