"""Tower features: right, computed once, and keyed by all that they depend on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train.feature_files import FeatureFiles
from train.features import TowerFeatures, tower_hash


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


def features_of(
    tower: Any, image_processor: Any, pictures: Pictures, cache: Path, **options: Any
) -> TowerFeatures:
    return TowerFeatures(
        tower,
        image_processor,
        pictures.openers(),
        pictures.identities,
        cache=cache,
        **options,
    )


def test_features_are_the_hidden_states_without_cls(
    tower: Any, image_processor: Any, tmp_path: Path
) -> None:
    pictures = Pictures(5)
    kept = features_of(tower, image_processor, pictures, tmp_path, dtype="float32")
    kept.read([4])
    pixels = image_processor(images=pictures.images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    # Measured worst: 5e-7, from batches of another size.
    order = [3, 4, 0, 1, 2, 4]
    torch.testing.assert_close(kept(order)["image_features"], states[order], atol=1e-5, rtol=0)


def test_each_picture_is_encoded_once(tower: Any, image_processor: Any, tmp_path: Path) -> None:
    pictures = Pictures(3)
    kept = features_of(tower, image_processor, pictures, tmp_path)
    first = kept.read([0, 2, 2])
    assert pictures.num_opened == 2
    again = features_of(tower, image_processor, pictures, tmp_path)
    np.testing.assert_array_equal(again.read([0, 2, 2]), first)
    assert pictures.num_opened == 2
    again.read([0, 1])
    assert pictures.num_opened == 3


def test_other_data_with_the_same_pictures_find_them(
    tower: Any, image_processor: Any, tmp_path: Path
) -> None:
    pictures, others = Pictures(3), Pictures(5)
    features_of(tower, image_processor, pictures, tmp_path).read(range(3))
    features_of(tower, image_processor, others, tmp_path).read(range(5))
    assert others.num_opened == 2


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


@pytest.mark.parametrize("change", ["layer", "drop_first", "dtype", "bf16", "processor"])
def test_what_features_depend_on_is_in_the_key(
    tower: Any, image_processor: Any, tmp_path: Path, change: str
) -> None:
    pictures = Pictures(2)
    features_of(tower, image_processor, pictures, tmp_path).read([0, 1])
    options: dict[str, Any] = {
        "layer": {"layer": -1},
        "drop_first": {"drop_first": False},
        "dtype": {"dtype": "float32"},
        "bf16": {"bf16": True},
        "processor": {},
    }[change]
    if change == "processor":
        image_processor.image_mean = [0.1, 0.2, 0.3]
    features_of(tower, image_processor, pictures, tmp_path, **options).read([0, 1])
    assert pictures.num_opened == 4


def test_a_repainted_picture_is_another(tower: Any, image_processor: Any, tmp_path: Path) -> None:
    pictures = Pictures(2)
    features_of(tower, image_processor, pictures, tmp_path).read([0, 1])
    pictures.identities[1] += " repainted"
    features_of(tower, image_processor, pictures, tmp_path).read([0, 1])
    assert pictures.num_opened == 3


def test_a_picture_that_cannot_be_read_leaves_the_others(
    tower: Any, image_processor: Any, tmp_path: Path
) -> None:
    pictures = Pictures(3)
    kept = features_of(tower, image_processor, pictures, tmp_path)
    whole = kept.read([0, 1])

    def broken() -> Image.Image:
        raise OSError("picture 2 cannot be read")

    kept.open_images[2] = broken  # type: ignore[index]
    with pytest.raises(OSError, match="picture 2"):
        kept.read([0, 1, 2])
    np.testing.assert_array_equal(kept.read([0, 1]), whole)


def test_full_disk_is_told_and_training_goes_on(
    tower: Any,
    image_processor: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureFiles, "add", full)
    kept = features_of(tower, image_processor, Pictures(3), tmp_path)
    np.testing.assert_array_equal(kept.read([0, 1]), kept.read([0, 1, 2])[:2])
    (record,) = caplog.records
    assert "No space left" in record.getMessage()
