"""The command line: results on stdout, one sentence for a fault, status 2."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time

import pytest
from PIL import Image

import vision_moe
from mllm import cli
from vision_moe import InputError


@pytest.fixture
def run(capsys):
    """``run(*arguments)`` -> exit status, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as done:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    return run


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def assert_one_sentence(result, *words):
    status, out, err = result
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert all(word in err for word in words), err


def raising(monkeypatch, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("mllm.evaluate.evaluate_checkpoint", fail)


def test_help_lists_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    for command in ("quickstart", "upcycle", "train", "eval", "chat", "inspect"):
        assert f"  {command} " in out


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom mllm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_quick():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mllm", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.7  # seen: 0.1


def test_chat_answers_on_stdout(run, mllm_folder, picture):
    status, out, _ = run("chat", mllm_folder, "--image", picture, "--question", "is it red?")
    assert status == 0
    assert out.endswith("\n")


def test_eval_writes_scores(run, mllm_folder, tmp_path):
    status, out, _ = run(
        "eval", mllm_folder, "--task", "easy_vqa", "--num-questions", 4, "--out", tmp_path / "s"
    )
    assert status == 0
    assert out.startswith("easy_vqa, 4 questions")
    assert json.loads((tmp_path / "s" / "scores.json").read_text())["n"] == 4


def test_eval_scores_again(run, mllm_folder, tmp_path):
    out = tmp_path / "s"
    run("eval", mllm_folder, "--task", "easy_vqa", "--num-questions", 4, "--out", out)
    status, text, _ = run("eval", "--rescore", out)
    assert status == 0
    assert text.startswith("easy_vqa, 4 questions")
    assert "rescored_with" in json.loads((out / "scores.json").read_text())


def test_eval_wants_one_source_of_answers(run, tmp_path):
    status, _, err = run("eval", "checkpoint", "--rescore", tmp_path)
    assert status == 2
    assert "one of CHECKPOINT, --answers and --rescore" in err


def test_inspect_prints_a_table_and_writes_a_picture(run, clip_folder, tmp_path):
    status, out, _ = run("inspect", clip_folder, "--out", tmp_path / "a.png")
    assert status == 0
    assert "vision tower" in out
    assert (tmp_path / "a.png").is_file()


def test_convert_low_rank_prints_what_is_lost_and_writes_the_folder(run, clip_folder, tmp_path):
    out = tmp_path / "low"
    status, table, _ = run("convert", "low-rank", clip_folder, "--out", out, "--rank", 3)
    assert status == 0
    header, *blocks = table.strip().splitlines()
    assert "change lost" in header
    assert len(blocks) == len(vision_moe.moe_layers(vision_moe.load(out)))
    assert {block.split()[1] for block in blocks} == {"3"}


def test_convert_low_rank_twice_is_one_sentence(run, clip_folder, tmp_path):
    run("convert", "low-rank", clip_folder, "--out", tmp_path / "low", "--rank", 3)
    result = run("convert", "low-rank", tmp_path / "low", "--out", tmp_path / "lower")
    assert_one_sentence(result, "low rank already")
    assert not (tmp_path / "lower").exists()


def test_missing_picture_is_one_sentence(run, mllm_folder):
    assert_one_sentence(
        run("chat", mllm_folder, "--image", "absent.png", "--question", "a"), "absent.png"
    )


def test_damaged_picture_is_one_sentence(run, mllm_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    assert_one_sentence(
        run("chat", mllm_folder, "--image", tmp_path / "bad.png", "--question", "a"), "bad.png"
    )


def test_missing_checkpoint_is_one_sentence(run, picture, tmp_path):
    result = run("chat", tmp_path / "none", "--image", picture, "--question", "a")
    assert_one_sentence(result, "none", "no such folder")


def test_unknown_task_is_one_sentence(run, mllm_folder):
    assert_one_sentence(run("eval", mllm_folder, "--task", "easy_qa"), "easy_vqa")


def test_negative_seed_is_one_sentence(run):
    assert_one_sentence(run("eval", "checkpoint", "--task", "scenes", "--seed", -1), "seed is -1")


def test_unwritable_scores_are_told_before_the_questions_are_asked(
    run, mllm_folder, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("mllm.evaluate.evaluate_model", None)
    result = run("eval", mllm_folder, "--task", "scenes", "--out", tmp_path / "file" / "scores")
    assert_one_sentence(result, "scores: cannot be written")


def test_table_is_printed_where_the_picture_cannot_be_written(run, clip_folder, tmp_path):
    (tmp_path / "file").touch()
    status, out, err = run("inspect", clip_folder, "--out", tmp_path / "file" / "a.png")
    assert status == 2
    assert "vision tower" in out
    assert err.startswith("mllm: ") and "a.png: cannot be written" in err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("record 3:\n no answer"), ["record 3: no answer"]),
        (OSError(errno.ENOSPC, "No space left on device", "a.txt"), ["disk is full", "a.txt"]),
        (RuntimeError("write: No space left on device (os error 28)"), ["disk is full"]),
        (OSError(errno.EROFS, "Read-only file system", "out"), ["out: Read-only file system"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), ["x: No such file"]),
    ],
)
def test_fault_is_one_sentence(run, monkeypatch, error, words):
    raising(monkeypatch, error)
    assert_one_sentence(run("eval", "checkpoint", "--task", "scenes"), *words)


def test_debug_shows_the_traceback(monkeypatch):
    raising(monkeypatch, InputError("a fault"))
    with pytest.raises(InputError):
        cli.main(["--debug", "eval", "checkpoint", "--task", "scenes"])


def test_defect_of_ours_is_not_hidden(monkeypatch):
    raising(monkeypatch, KeyError("a bug"))
    with pytest.raises(KeyError):
        cli.main(["eval", "checkpoint", "--task", "scenes"])


def test_interrupt_ends_with_130(run, monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    status, _, err = run("eval", "checkpoint", "--task", "scenes")
    assert status == 130
    assert err.strip() == "mllm: interrupted"


def test_recipe_runs_and_its_folder_is_printed(run, monkeypatch, tmp_path):
    monkeypatch.setattr("train.run_recipe", lambda _recipe: tmp_path)
    assert run("train", "pretrain")[:2] == (0, f"{tmp_path}\n")


def test_recipe_of_another_command_is_one_sentence(run):
    assert_one_sentence(run("upcycle", "pretrain"), "one for 'mllm train'")


def test_unknown_recipe_is_one_sentence(run):
    assert_one_sentence(run("train", "pretrian"), "pretrain")


def test_wrong_use_ends_with_2(run):
    status, out, err = run("eval", "checkpoint")
    assert (status, out) == (2, "")
    assert "--task" in err
