"""Zero-shot classification: folders, names, templates and ranks."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from vision_moe import (
    CLIPMoEModel,
    InputError,
    class_features,
    read_class_folder,
    zero_shot_metrics,
    zero_shot_ranks,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, number in (("tabby_cat", 2), ("dog", 1)):
        (tmp_path / name / "more").mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (8, 8)).save(tmp_path / name / "more" / f"{index}.JPG", "JPEG")
    (tmp_path / "dog" / "readme.txt").touch()
    (tmp_path / "readme.txt").touch()
    return tmp_path


def test_folders_are_the_classes(folder: Path) -> None:
    classes = read_class_folder(folder)
    assert classes.classes == ["dog", "tabby cat"]
    assert classes.labels == [0, 1, 1]
    assert [image.parent.parent.name for image in classes.images] == ["dog"] + ["tabby_cat"] * 2


def test_names_from_a_file(folder: Path) -> None:
    names = folder / "names.json"
    names.write_text(json.dumps({"dog": "poodle", "tabby_cat": "tabby", "cow": "cow"}))
    assert read_class_folder(folder, names).classes == ["poodle", "tabby"]


def test_a_thousand_wordnet_folders_are_imagenet(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"n{number:08d}").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "n00000007" / "a.png")
    classes = read_class_folder(tmp_path)
    assert classes.classes[:2] == ["tench", "goldfish"] and classes.labels == [7]


def test_some_wordnet_folders_need_names(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"n{number:08d}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"n{number:08d}" / "a.png")
    with pytest.raises(InputError, match="2 folders are named by WordNet numbers"):
        read_class_folder(tmp_path)


def test_what_is_no_folder_of_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: cannot be read"):
        read_class_folder(tmp_path / "none")
    with pytest.raises(InputError, match="holds 1 folders, one for each class"):
        read_class_folder(folder / "dog")
    empty = tmp_path / "empty"
    for name in ("a", "b"):
        (empty / name).mkdir(parents=True)
    with pytest.raises(InputError, match="no pictures in its folders"):
        read_class_folder(empty)


@pytest.mark.parametrize(
    ("content", "fault"),
    [("{", "cannot be read as JSON"), ("[]", "not a JSON object"),
     ('{"dog": "poodle"}', "no class name for the folder 'tabby_cat'")],
)  # fmt: skip
def test_damaged_names_are_refused(folder: Path, content: str, fault: str) -> None:
    (folder / "names.json").write_text(content)
    with pytest.raises(InputError, match=fault):
        read_class_folder(folder, folder / "names.json")


def test_class_is_the_mean_over_the_templates(dense_clip: CLIPMoEModel) -> None:
    features = class_features(dense_clip, ["dog", "cat"], "simple", progress=False)
    texts = [template("cat") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    each = dense_clip.encode_text(dense_clip.tokenizer(texts), normalize=True).detach()
    expected = torch.nn.functional.normalize(each.mean(0), dim=0)
    # Worst error measured: none; another order of the sums would make one.
    torch.testing.assert_close(features[1], expected, atol=1e-6, rtol=0)


def test_unknown_templates_are_refused(dense_clip: CLIPMoEModel) -> None:
    with pytest.raises(InputError, match="no templates 'fancy', only openai, simple"):
        class_features(dense_clip, ["dog"], "fancy", progress=False)


CLASSES = torch.eye(6)


def test_ranks_worked_out_by_hand() -> None:
    images = torch.tensor([[9.0, 1, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0], [6, 5, 4, 3, 2, 1.0]])
    labels = torch.tensor([0, 1, 5])
    assert zero_shot_ranks(images, CLASSES, labels).tolist() == [0, 1, 5]
    metrics = zero_shot_metrics(images, CLASSES, labels)
    assert metrics == pytest.approx(
        {"accuracy_1": 1 / 3, "accuracy_5": 2 / 3, "mean_class_accuracy": 1 / 3}
    )


def test_classes_weigh_the_same_in_their_mean() -> None:
    images = torch.eye(6)[[0, 0, 0, 1]]
    metrics = zero_shot_metrics(images, CLASSES, torch.tensor([0, 0, 0, 2]))
    assert metrics["accuracy_1"] == 0.75
    assert metrics["mean_class_accuracy"] == 0.5


def test_collapsed_features_score_zero() -> None:
    metrics = zero_shot_metrics(torch.ones(4, 6), CLASSES, torch.arange(4))
    assert metrics["accuracy_1"] == 0.0
