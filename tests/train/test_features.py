"""Tower features: right, computed once, and keyed by all that they depend on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train.features import cached_features, tower_hash


class Pictures:
    """Pictures that count how often they are opened."""

    def __init__(self, count: int) -> None:
        self.images = [Image.new("RGB", (32, 32), (20 * i, 0, 255 - 20 * i)) for i in range(count)]
        self.num_opened = 0
        self.identities = [f"picture {i}" for i in range(count)]

    def openers(self) -> list[Any]:
        def opener(image: Image.Image) -> Any:
            def open_one() -> Image.Image:
                self.num_opened += 1
                return image

            return open_one

        return [opener(image) for image in self.images]


@pytest.fixture
def tower(clip: Any) -> Any:
    return clip.to_vision_model()


def compute(
    tower: Any, image_processor: Any, pictures: Pictures, cache: Path, **options: Any
) -> Any:
    return cached_features(
        tower, image_processor, pictures.openers(), pictures.identities, cache=cache, **options
    )


def test_features_are_the_hidden_states_without_cls(
    tower: Any, image_processor: Any, tmp_path: Path
) -> None:
    pictures = Pictures(5)
    features = compute(tower, image_processor, pictures, tmp_path, dtype="float32", batch_size=2)
    pixels = image_processor(images=pictures.images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
    # Measured worst: 5e-7, from batches of another size.
    np.testing.assert_allclose(features, states[-2][:, 1:].numpy(), atol=1e-5)


def test_features_are_computed_once(tower: Any, image_processor: Any, tmp_path: Path) -> None:
    pictures = Pictures(3)
    first = compute(tower, image_processor, pictures, tmp_path)
    second = compute(tower, image_processor, pictures, tmp_path)
    assert pictures.num_opened == 3
    assert isinstance(second, np.memmap)
    np.testing.assert_array_equal(first, second)


def test_other_weights_have_another_hash(tower: Any) -> None:
    before = tower_hash(tower)
    with torch.no_grad():
        next(tower.parameters()).view(-1)[0] += 1
    assert tower_hash(tower) != before


def test_hash_is_the_same_after_saving_and_loading(
    tower: Any, clip_folder: Path, tmp_path: Path
) -> None:
    loaded = type(tower).from_pretrained(clip_folder)
    assert tower_hash(loaded) == tower_hash(tower)


@pytest.mark.parametrize("change", ["images", "layer", "dtype", "processor"])
def test_what_features_depend_on_is_in_the_key(
    tower: Any, image_processor: Any, tmp_path: Path, change: str
) -> None:
    pictures = Pictures(2)
    compute(tower, image_processor, pictures, tmp_path)
    options: dict[str, Any] = {}
    if change == "images":
        pictures.identities[1] += " repainted"
    elif change == "layer":
        options["layer"] = -1
    elif change == "dtype":
        options["dtype"] = "float32"
    else:
        image_processor.image_mean = [0.1, 0.2, 0.3]
    compute(tower, image_processor, pictures, tmp_path, **options)
    assert pictures.num_opened == 4


def test_interrupted_computation_leaves_no_features(
    tower: Any, image_processor: Any, tmp_path: Path
) -> None:
    def broken() -> Image.Image:
        raise OSError("picture 2 cannot be read")

    pictures = Pictures(3)
    openers = [*pictures.openers()[:2], broken]
    with pytest.raises(OSError, match="picture 2"):
        cached_features(
            tower, image_processor, openers, pictures.identities, cache=tmp_path, batch_size=1
        )
    assert not [path for path in (tmp_path / "features").iterdir() if path.is_dir()]
