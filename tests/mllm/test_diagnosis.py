"""mllm inspect --data: what is measured, and what is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vision_moe
from mllm import cli
from mllm.diagnosis import diagnose, diagnosis_table, read_diagnostic_data, scenes_data
from mllm.diagnosis.measure import I2T, T2I, measure
from vision_moe import CLIPMoEModel, InputError

NUM = 12


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    lines = []
    for number in range(NUM):
        Image.new("RGB", (32, 32), (20 * number, 255 - 20 * number, 0)).save(
            tmp_path / f"{number}.png"
        )
        record: dict[str, Any] = {"image": f"{number}.png", "caption": f"number {number}"}
        record["factors"] = {"parity": "odd" if number % 2 else "even"}
        if number < 5:
            record["negatives"] = {"number": f"number {number + 100}"}
        lines.append(json.dumps(record))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path / "captions.jsonl"


def test_factors_and_negatives_are_read(captions: Path) -> None:
    data = read_diagnostic_data(captions)
    assert data.negatives == {"number": [(i, f"number {i + 100}") for i in range(5)]}
    assert data.factors["parity"] == ["even", "odd"] * 6


@pytest.mark.parametrize("key", ["factors", "negatives"])
def test_damaged_extras_are_named(captions: Path, key: str) -> None:
    record = {"image": "0.png", "caption": "x", key: {"color": 5}}
    captions.write_text(captions.read_text() + "\n" + json.dumps(record))
    with pytest.raises(InputError, match=f"line 13: '{key}' must be an object of texts"):
        read_diagnostic_data(captions)


def test_few_pictures_are_refused(captions: Path) -> None:
    captions.write_text(captions.read_text().splitlines()[0])
    with pytest.raises(InputError, match="needs at least 10"):
        read_diagnostic_data(captions)


def test_unreadable_picture_is_left_out_with_all_that_belongs_to_it(
    clip: CLIPMoEModel, captions: Path
) -> None:
    lines = captions.read_text().splitlines()
    whole = read_diagnostic_data(captions)
    (captions.parent / "3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1 of 12 pictures cannot be read, more than one in"):
        read_diagnostic_data(captions)
    for number in range(NUM, 100):                         # now it is one in a hundred
        (captions.parent / f"{number}.png").write_bytes((captions.parent / "0.png").read_bytes())
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"number {number}"}))
    captions.write_text("\n".join(lines))
    data = read_diagnostic_data(captions)
    assert len(data.pictures) == len(data.captions) == 99
    assert [data.captions[n] for n, _ in data.negatives["number"]] == [
        f"number {n}" for n in (0, 1, 2, 4)
    ]
    assert data.image_of_caption == list(range(99))
    del whole.factors["parity"][3]
    assert data.factors["parity"][:11] == whole.factors["parity"]
    found = diagnose(clip, data)
    assert list(found.data["skipped"]) == [str(captions.parent / "3.png")]
    assert "99 pictures, 99 captions\nleft out: " in diagnosis_table(found)


def test_scenes_know_their_factors() -> None:
    data = scenes_data(32, num_scenes=10)
    assert set(data.factors) >= {"shape", "color", "background"}
    number, changed = data.negatives["color"][0]
    words = set(data.captions[number].split()) ^ set(changed.split())
    assert words and data.factors["color"][number] in words
    assert data.pictures[0]().size == (32, 32)


def test_solo_share_is_that_of_the_dense_model_with_the_experts_weights(
    clip: CLIPMoEModel, captions: Path
) -> None:
    data = read_diagnostic_data(captions)
    diagnosis = diagnose(clip, data)
    layers = vision_moe.moe_layers(clip)
    for layer in layers.values():  # every expert becomes expert 2
        for expert in layer.experts:
            expert.load_state_dict(layer.experts[2].state_dict())
    assert diagnosis.shares["expert 2"] == measure(clip, data, 64, True).shares()


def test_diagnosis_of_equal_experts_finds_no_diversity(
    clip: CLIPMoEModel, captions: Path
) -> None:
    for layer in vision_moe.moe_layers(clip).values():
        for expert in layer.experts:
            expert.load_state_dict(layer.experts[0].state_dict())
    found = diagnose(clip, read_diagnostic_data(captions))
    for gap in found.oracle.values():
        assert gap.oracle == gap.best_single and gap.capture is None
    np.testing.assert_allclose(found.cka["image"], 1.0, atol=1e-5)
    np.testing.assert_allclose(found.complementarity[T2I]["disagreement"], 0.0, atol=1e-12)
    assert all(one[I2T].difference == 0 for one in found.leave_one_out.values())
    assert all(np.isnan(one).all() for one in found.weight_cosines.values())


def test_control_tells_what_several_models_alone_give(
    clip: CLIPMoEModel, captions: Path
) -> None:
    found = diagnose(clip, read_diagnostic_data(captions), control=clip)
    assert found.control_oracle == found.oracle
    assert found.agreement is not None and set(found.agreement.values()) == {1.0}


def test_dense_model_is_refused(captions: Path, clip: CLIPMoEModel) -> None:
    torch.manual_seed(0)
    config = clip.config.to_dict() | {"moe": None}
    dense = CLIPMoEModel(vision_moe.CLIPMoEConfig.from_dict(config)).eval()
    with pytest.raises(InputError, match="the model is dense"):
        diagnose(dense, read_diagnostic_data(captions))


def test_inspect_writes_table_numbers_and_pictures(
    capsys: pytest.CaptureFixture[str], clip_folder: Path, captions: Path, tmp_path: Path
) -> None:
    arguments = ["inspect", clip_folder, "--data", captions, "--control", clip_folder]
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in [*arguments, "--out", tmp_path / "seen.png"]])
    assert end.value.code == 0
    table = capsys.readouterr().out
    for words in ("routing load", "answered, in %", "above control", "kappa", "dead",
                  "one expert left out", "parity"):  # fmt: skip
        assert words in table, words
    for name in ("seen.png", "seen-diagnosis.png", "seen-patches.png"):
        assert Image.open(tmp_path / name).width > 500
    numbers = json.loads((tmp_path / "seen-diagnosis.json").read_text())
    assert len(numbers["routing"]) == 5
    assert numbers["shares"]["routed"].keys() == {I2T, T2I, "number"}
    json.dumps(numbers, allow_nan=False)


def test_mllm_folder_has_no_text_tower_to_try(mllm_folder: Path, captions: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", str(mllm_folder), "--data", str(captions), "--out",
                  str(captions.with_name("x.png"))])  # fmt: skip
    assert end.value.code == 2
