"""Retrieval sets in the files in which they are distributed."""

import json
from pathlib import Path
from typing import Any

import pytest

from vision_moe import CaptionSet, InputError, read_caption_set

ONE = "A dog runs."
TWO = 'Two cats, "sleeping".'
THREE = "A red bus"


def written(folder: Path, content: Any, name: str = "captions") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def flat(captions: CaptionSet, root: Path) -> dict[str, list[str]]:
    images = [str(image.relative_to(root)) for image in captions.images]
    result: dict[str, list[str]] = {image: [] for image in images}
    for number, caption in zip(captions.image_of_caption, captions.captions, strict=True):
        result[images[number]].append(caption)
    return result


COCO = {
    "info": {},
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": ONE},
        {"id": 2, "image_id": 7, "caption": THREE + "\n"},
        {"id": 3, "image_id": 3, "caption": TWO},
    ],
}
FORMATS = {
    "coco": COCO,
    "kaggle": "image_name| comment_number| comment\n"
    f"a.jpg| 0| {ONE}\nb.jpg| 0| {THREE}\na.jpg| 1| {TWO}\n",
    "tokens": f"a.jpg#0\t{ONE}\na.jpg#1\t{TWO}\nb.jpg#0\t{THREE}\n",
    "csv": f'\ufeffimage,caption\r\na.jpg,{ONE}\r\nb.jpg,{THREE}\r\n'
    'a.jpg,"Two cats, ""sleeping""."\r\n',
    "jsonl": "\n".join(
        json.dumps({"image": image, "caption": caption})
        for image, caption in (("a.jpg", ONE), ("b.jpg", THREE), ("a.jpg", TWO))
    ),
    "jsonl with lists": "\n".join(
        json.dumps({"image": image, "captions": captions})
        for image, captions in (("a.jpg", [ONE, TWO]), ("b.jpg", [THREE]))
    ),
    "one line of jsonl": json.dumps({"image": "a.jpg", "captions": [ONE, TWO]}),
}


@pytest.mark.parametrize("form", FORMATS)
def test_captions_of_each_picture_are_found(tmp_path: Path, form: str) -> None:
    captions = read_caption_set(written(tmp_path, FORMATS[form]))
    expected = {"a.jpg": [ONE, TWO], "b.jpg": [THREE]}
    if form == "one line of jsonl":
        del expected["b.jpg"]
    assert flat(captions, tmp_path) == expected
    assert captions.splits == {}


def test_pictures_lie_where_one_says(tmp_path: Path) -> None:
    captions = read_caption_set(written(tmp_path, COCO), tmp_path / "val2014")
    assert captions.images == [tmp_path / "val2014" / name for name in ("a.jpg", "b.jpg")]


KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val2014", "filename": "a.jpg", "split": "test",
         "sentences": [{"raw": ONE, "tokens": []}, {"raw": TWO}]},
        {"filepath": "train2014", "filename": "b.jpg", "split": "restval",
         "sentences": [{"raw": THREE}]},
        {"filename": "c.jpg", "split": "train", "sentences": [{"raw": THREE}]},
    ],
}  # fmt: skip
NLPHUJI = (
    "raw,sentids,split,filename,img_id\n"
    + f'"[""{ONE}"", ""{THREE}""]","[0, 1]",test,a.jpg,0\n'
    + f'"[""{THREE}""]",[2],train,b.jpg,1\n'
)


def test_karpathys_test_split_is_the_default(tmp_path: Path) -> None:
    captions = read_caption_set(written(tmp_path, KARPATHY))
    assert flat(captions, tmp_path) == {"val2014/a.jpg": [ONE, TWO]}
    assert captions.splits == {"test": 1, "train": 2}


def test_restval_belongs_to_train(tmp_path: Path) -> None:
    captions = read_caption_set(written(tmp_path, KARPATHY), split="train")
    assert flat(captions, tmp_path) == {"train2014/b.jpg": [THREE], "c.jpg": [THREE]}


def test_whole_set_is_taken_on_demand(tmp_path: Path) -> None:
    assert len(read_caption_set(written(tmp_path, KARPATHY), split="all").images) == 3


def test_table_with_splits_and_lists(tmp_path: Path) -> None:
    path = written(tmp_path, NLPHUJI)
    assert flat(read_caption_set(path), tmp_path) == {"a.jpg": [ONE, THREE]}
    assert len(read_caption_set(path, split="all").captions) == 3


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "is no list of captions"),
        ("a,b\n1,2\n", "is no list of captions"),
        ("[1, 2]", "is no list of captions"),
        ("{damaged", "line 1: not JSON"),
        ({"images": 5, "annotations": []}, "not COCO's captions"),
        ({"images": [], "annotations": 5}, "'annotations' is no list"),
        ({"images": [], "annotations": []}, "holds no captions"),
        ({"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}, "the id 1"),
        ({**COCO, "annotations": [{"image_id": 3, "caption": " "}]}, "annotation 1: a caption is"),
        ({"images": [{"filename": "a.jpg"}]}, "image 1: 'sentences' is no list"),
        ({"images": [{"sentences": []}]}, "image 1: 'filename' is missing"),
        ('{"image": "a.jpg"}', "line 1: a caption is missing"),
        ('{"image": "a.jpg", "captions": 5}', "line 1: a caption is missing"),
        ('{"image": "../a.jpg", "caption": "x"}', "outside the image folder"),
        ("image,caption\na.jpg\n", "record 1: has 1 columns"),
        ("image,caption\na.jpg," + "y" * 200_000, "record 1: not a table"),
        ("filename,raw\na.jpg,[5\n", "record 1: 'raw' is no JSON list"),
        ("a.jpg#0\tx\nb.jpg x\n", "line 2: not 'picture#number<TAB>caption'"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, content: Any, fault: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_caption_set(path)
    assert str(path) in str(caught.value) and fault in str(caught.value)


def test_missing_file_and_unknown_split_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: cannot be read"):
        read_caption_set(tmp_path / "none")
    with pytest.raises(InputError, match="has no split 'val', it has test, train"):
        read_caption_set(written(tmp_path, KARPATHY), split="val")
    with pytest.raises(InputError, match="has no split 'test', it has no splits"):
        read_caption_set(written(tmp_path, COCO), split="test")
