"""Retrieval and zero-shot classification of CLIP folders, from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vision_moe
from mllm import cli
from mllm.clip_evaluation import CLIPEvaluationConfig, evaluate_clips
from vision_moe import InputError

COLORS = ["red", "lime", "blue", "white", "black", "yellow"]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Two captions a picture."""
    lines = []
    for color in COLORS:
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
        texts = [f"all {color}", f"a picture in {color}"]
        lines.append(json.dumps({"image": f"{color}.png", "captions": texts}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path / "captions.jsonl"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for color in COLORS:
        (tmp_path / "classes" / color).mkdir(parents=True)
        for shade in range(2):
            path = tmp_path / "classes" / color / f"{shade}.png"
            Image.new("RGB", (32, 32 + shade), color).save(path)
    return tmp_path / "classes"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    output = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, output.out, output.err


def scores(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return content


def test_retrieval_is_that_of_the_features(
    capsys: pytest.CaptureFixture[str], clip_folder: Path, captions: Path, tmp_path: Path
) -> None:
    status, table, _ = run(
        capsys, "eval", clip_folder, "--task", "retrieval", "--data", captions, "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert status == 0
    clip = vision_moe.load(clip_folder)
    pictures = [vision_moe.open_image(captions.parent / f"{color}.png") for color in COLORS]
    texts = [text for color in COLORS for text in (f"all {color}", f"a picture in {color}")]
    with torch.inference_mode():
        expected = vision_moe.retrieval_recall(
            clip.encode_image(torch.stack([clip.preprocess(one) for one in pictures])),
            clip.encode_text(clip.tokenizer(texts)),
            image_of_text=torch.arange(12) // 2,
        )
    assert scores(tmp_path / "out")["metrics"] == pytest.approx(expected)
    assert f"{100 * expected['t2i_r5']:.1f}" in table and "6 pictures, 12 captions" in table
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 18 == scores(tmp_path / "out")["n"]
    firsts = [one["rank"] == 0 for one in predictions if one["direction"] == "t2i"]
    assert sum(firsts) / 12 == pytest.approx(expected["t2i_r1"])


def test_several_models_stand_side_by_side(
    capsys: pytest.CaptureFixture[str], clip_folder: Path, classes: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    vision_moe.save(vision_moe.load(clip_folder), other)
    status, table, _ = run(
        capsys, "eval", clip_folder, other, "--task", "zero_shot", "--data", classes,
        "--templates", "simple", "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 0
    head, _, first, second = table.splitlines()
    assert "12 pictures, 6 classes" in head
    assert first.startswith(str(clip_folder)) and second.startswith(str(other))
    one, two = (scores(tmp_path / "out" / name) for name in (clip_folder.name, "other"))
    assert one["metrics"] == two["metrics"]
    assert one["prompt"] == "simple" or one["config"]["templates"] == "simple"


def test_models_of_one_name_get_folders_of_their_own(
    clip_folder: Path, captions: Path, tmp_path: Path
) -> None:
    config = CLIPEvaluationConfig(str(captions))
    evaluate_clips([clip_folder, clip_folder], "retrieval", config, tmp_path / "out", False)
    name = clip_folder.name
    assert {one.name for one in (tmp_path / "out").iterdir()} == {f"1-{name}", f"2-{name}"}


def test_caption_of_a_picture_that_is_skipped_goes_with_it(
    clip_folder: Path, tmp_path: Path
) -> None:
    lines = []
    for number in range(100):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "captions": [f"{number}", "x"]}))
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    config = CLIPEvaluationConfig(str(tmp_path / "captions.jsonl"))
    (result,) = evaluate_clips([clip_folder], "retrieval", config, progress=False)
    assert list(result.scores["skipped"]) == [str(tmp_path / "3.png")]
    assert len(result.predictions) == 99 + 198
    assert not [one for one in result.predictions if one["image"].endswith("/3.png")]


def test_data_must_be_given(capsys: pytest.CaptureFixture[str], clip_folder: Path) -> None:
    status, _, error = run(capsys, "eval", clip_folder, "--task", "retrieval")
    assert status == 2 and error == "mllm: the task 'retrieval' needs --data\n"


def test_questions_are_put_to_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, "eval", "a", "b", "--task", "scenes")
    assert status == 2 and "one of CHECKPOINT" in error


def test_what_is_no_clip_is_refused(captions: Path, mllm_folder: Path) -> None:
    config = CLIPEvaluationConfig(str(captions))
    with pytest.raises(InputError, match="model_type is 'llava'"):
        evaluate_clips([mllm_folder], "retrieval", config, progress=False)
    with pytest.raises(InputError, match="ViT-B-32:nobody"):
        evaluate_clips(["ViT-B-32:nobody"], "retrieval", config, progress=False)
