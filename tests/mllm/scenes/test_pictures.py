"""Pictures are drawn smoothly, where the scene says, and rendered once."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm.scenes import (
    Scene,
    SceneObject,
    ScenesDataset,
    SceneWorld,
    pictures,
    render,
    render_pictures,
)
from mllm.scenes.world import BACKGROUNDS, COLORS, LETTERS, SHAPES

WORLD = SceneWorld()
#: Every value there is.
WIDE = SceneWorld(shapes=SHAPES, colors=COLORS, backgrounds=BACKGROUNDS, letters=LETTERS)


def test_picture_has_the_size_that_is_asked_for(wide: list[Scene]) -> None:
    assert render(wide[0], 48).size == (48, 48)


def test_edges_are_anti_aliased() -> None:
    disc = SceneObject("circle", "black", "large", "solid", "center", 0.5, 0.5, 0.5)
    gray = np.asarray(render(Scene("plain", disc, (), None, None, 0), 32).convert("L"))
    inside, outside = int(gray[16, 16]), int(gray[0, 0])
    between = (gray > inside + 20) & (gray < outside - 20)
    # Measured: 36 on a circle 16 pixels wide; a hard edge leaves none.
    assert between.sum() > 20


@pytest.mark.parametrize("size", [16, 32, 224])
def test_picture_looks_the_same_at_every_size(size: int) -> None:
    disc = SceneObject("circle", "red", "large", "solid", "top left", 0.3, 0.3, 0.4)
    scene = Scene("plain", disc, (), "H", "right", 0)
    reference = np.asarray(render(scene, 64).resize((16, 16), Image.Resampling.BOX), dtype=float)
    picture = np.asarray(render(scene, size).resize((16, 16), Image.Resampling.BOX), dtype=float)
    assert np.abs(reference - picture).mean() < 3  # measured: 1.1 of 255 at 16 pixels


def test_every_value_can_be_drawn_at_every_size(wide: list[Scene]) -> None:
    for scene in wide[:60]:
        for size in (8, 33):
            assert render(scene, size).mode == "RGB"


def test_objects_are_drawn_where_the_scene_says() -> None:
    square = SceneObject("cross", "blue", "large", "solid", "bottom right", 0.7, 0.6, 0.5)
    picture = np.asarray(render(Scene("plain", square, (), None, None, 3), 100), dtype=int)
    blue = picture[..., 2] - picture[..., 0] > 100
    rows, columns = np.nonzero(blue)
    assert rows.min() == pytest.approx(35, abs=1) and rows.max() == pytest.approx(84, abs=1)
    assert columns.min() == pytest.approx(45, abs=1) and columns.max() == pytest.approx(94, abs=1)


@pytest.fixture
def picture_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path))
    return tmp_path / "scenes"


def test_cached_pictures_are_those_of_the_samples(picture_cache: Path) -> None:
    dataset = ScenesDataset(WORLD, "test", 7, image_size=16)
    expected = np.stack([np.asarray(dataset[i].image) for i in range(7)])
    np.testing.assert_array_equal(render_pictures(dataset), expected)


def test_several_processes_render_what_one_does(
    picture_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ScenesDataset(WORLD, "test", 7, image_size=16)
    alone = np.array(render_pictures(dataset))
    next(picture_cache.glob("*.npy")).unlink()
    monkeypatch.setattr(pictures, "_CHUNK", 3)  # three chunks, the last one short
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    np.testing.assert_array_equal(render_pictures(dataset), alone)


def test_pictures_are_rendered_once(
    picture_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ScenesDataset(WORLD, "test", 3, image_size=16)
    render_pictures(dataset)

    def forbidden(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(pictures, "_render_all", forbidden)
    assert len(render_pictures(dataset)) == 3


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"split": "train"}, {"length": 4}, {"image_size": 8}, {"world": WIDE}],
    ids=lambda other: next(iter(other)),
)
def test_another_data_set_has_pictures_of_its_own(
    picture_cache: Path, other: dict[str, Any]
) -> None:
    described: dict[str, Any] = {
        "world": WORLD, "split": "test", "length": 3, "seed": 0, "image_size": 16,
    }  # fmt: skip
    render_pictures(ScenesDataset(**described))
    render_pictures(ScenesDataset(**{**described, **other}))
    assert len(list(picture_cache.glob("*.npy"))) == 2


def test_other_drawing_code_has_pictures_of_its_own(
    picture_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm.scenes import dataset as dataset_module

    dataset = ScenesDataset(WORLD, "test", 3, image_size=16)
    before = np.array(render_pictures(dataset))
    monkeypatch.setattr(
        dataset_module, "render", lambda scene, size: render(scene, size).rotate(90)
    )
    assert not np.array_equal(render_pictures(dataset), before)


def test_interrupted_rendering_is_no_cache(
    picture_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ScenesDataset(WORLD, "test", 3, image_size=16)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_render_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_pictures(dataset)
    assert len(render_pictures(dataset)) == 3


def test_process_that_rendered_with_others_can_end(picture_cache: Path) -> None:
    dataset = ScenesDataset(WORLD, "test", 2 * pictures._CHUNK, image_size=8)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=render_pictures, args=(dataset,))
    process.start()
    process.join(120)  # joblib's renderers wait for 300 seconds unless told otherwise
    still_runs = process.is_alive()
    process.kill()
    assert not still_runs and list(picture_cache.glob("*.npy"))
