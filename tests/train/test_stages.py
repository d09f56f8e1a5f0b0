"""Stages: made once, whole or not at all, and never taken for another."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train import stages
from train.stages import Stage
from vision_moe import InputError


def write_result(folder: Path) -> None:
    (folder / "result.txt").write_text("made")


def forbidden(folder: Path) -> None:
    raise AssertionError("the stage was made again")


def stage(tmp_path: Path, lr: float = 0.1, inputs: tuple[str, ...] = ()) -> Stage:
    return Stage("base", tmp_path / "clip", {"lr": lr, "nested": {"steps": [1, 2]}}, inputs)


def test_stage_is_made_once(tmp_path: Path) -> None:
    first = stages.run(stage(tmp_path), write_result)
    second = stages.run(stage(tmp_path), forbidden)
    assert (first.skipped, second.skipped) == (False, True)
    assert (tmp_path / "clip" / "result.txt").read_text() == "made"


def test_skipped_stage_reports_the_seconds_that_it_took(tmp_path: Path) -> None:
    first = stages.run(stage(tmp_path), write_result)
    assert stages.run(stage(tmp_path), forbidden).seconds == pytest.approx(first.seconds, abs=1e-3)


def test_other_configuration_is_refused_and_named(tmp_path: Path) -> None:
    stages.run(stage(tmp_path), write_result)
    with pytest.raises(InputError, match="'lr' is 0.1 there and 0.2 now"):
        stages.run(stage(tmp_path, lr=0.2), forbidden)


def test_other_input_is_refused(tmp_path: Path) -> None:
    stages.run(stage(tmp_path, inputs=("a",)), write_result)
    with pytest.raises(InputError, match="what it was made from"):
        stages.run(stage(tmp_path, inputs=("b",)), forbidden)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "thesis.txt").touch()
    with pytest.raises(InputError, match="something other"):
        stages.run(stage(tmp_path), forbidden)


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip").touch()
    with pytest.raises(InputError, match="something other"):
        stages.run(stage(tmp_path), forbidden)


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    assert not stages.run(stage(tmp_path), write_result).skipped


def test_damaged_record_is_one_sentence(tmp_path: Path) -> None:
    stages.run(stage(tmp_path), write_result)
    (tmp_path / "clip" / stages.RECORD).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        stages.run(stage(tmp_path), forbidden)


def test_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_result(folder)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stages.run(stage(tmp_path), fail)
    assert list(tmp_path.iterdir()) == []


def test_killed_stage_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from train import stages\n"
        "def make(folder):\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "stages.run(stages.Stage('base', Path(sys.argv[1]), {}), make)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "clip")])
    assert ended.returncode == -9
    assert not (tmp_path / "clip").exists()


def test_fingerprint_follows_the_chain(tmp_path: Path) -> None:
    stages.run(stage(tmp_path), write_result)
    fingerprint = stages.fingerprint_of(tmp_path / "clip")
    assert fingerprint == f"stage:{stage(tmp_path).fingerprint}"


def test_fingerprint_of_a_strange_model_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    before = stages.fingerprint_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"a": 2}))
    assert stages.fingerprint_of(tmp_path) != before
