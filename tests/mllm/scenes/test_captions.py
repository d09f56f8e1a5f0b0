"""Captions say what the scene shows."""


import open_clip

from mllm.scenes import (
    Scene,
    SceneObject,
    ScenesDataset,
    SceneWorld,
    detailed_caption,
)
from mllm.scenes.world import BACKGROUNDS, COLORS, LETTERS, SHAPES

NUM_SCENES = 300
WORLD = SceneWorld()
#: Every value there is.
WIDE = SceneWorld(shapes=SHAPES, colors=COLORS, backgrounds=BACKGROUNDS, letters=LETTERS)


def test_captions_fit_64_clip_tokens() -> None:
    dataset = ScenesDataset(WIDE, "train", NUM_SCENES, detail_probability=1.0)
    tokenizer = open_clip.SimpleTokenizer(context_length=200)
    captions = [
        caption
        for i in range(NUM_SCENES)
        for caption in (dataset[i].coarse_caption, dataset[i].detailed_caption)
    ]
    assert int((tokenizer(captions) != 0).sum(1).max()) <= 64


def test_coarse_caption_without_details_names_the_main_object_alone() -> None:
    dataset = ScenesDataset(WORLD, "train", 50, detail_probability=0.0)
    for sample in (dataset[i] for i in range(50)):
        main = sample.scene.main
        assert sample.coarse_caption.split()[-1] == main.shape
        assert set(sample.coarse_caption.split()[:-1]) <= {
            "a", "photo", "picture", "of", "one", main.color,
        }  # fmt: skip


def test_every_other_coarse_caption_tells_the_color() -> None:
    dataset = ScenesDataset(WORLD, "train", 400, detail_probability=0.0)
    samples = [dataset[i] for i in range(400)]
    told = sum(sample.scene.main.color in sample.coarse_caption for sample in samples)
    assert 160 < told < 240  # 4 standard deviations of 400 coins


def test_detail_probability_leaves_the_scene_alone() -> None:
    plain, told = (
        ScenesDataset(WORLD, "train", 9, detail_probability=share)[8] for share in (0.0, 1.0)
    )
    assert plain.scene == told.scene


def test_detailed_caption_tells_every_factor() -> None:
    red = SceneObject("star", "red", "large", "dotted", "center", 0.5, 0.5, 0.4)
    blue = [
        SceneObject("cross", "blue", "small", "solid", place, 0.2, 0.2, 0.15)
        for place in ("top left", "left")
    ]
    lone = SceneObject("heart", "green", "small", "solid", "right", 0.8, 0.5, 0.15)
    scene = Scene("night", red, (*blue, lone), "K", "bottom", 0)
    assert detailed_caption(scene) == (
        "a large dotted red star at the center on night, two blue crosses,"
        " a green heart at the right, letter k"
    )
