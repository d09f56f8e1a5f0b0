import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from vision_moe import (
    InputError,
    atomic_directory,
    atomic_write_text,
    sha256_file,
    writable_folder,
)


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with atomic_directory(target) as aside:
        (aside / "file").write_text("text")
        assert not target.exists()
    assert (target / "file").read_text() == "text"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_existing_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with atomic_directory(tmp_path / "folder") as aside:
        (aside / "new").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]


def test_error_leaves_the_existing_directory(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "folder") as aside:
        (aside / "new").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_full_disk_is_an_input_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="cannot be written"),
        atomic_directory(tmp_path / "folder"),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
        full.flush()


def test_directory_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file stands"), atomic_directory(tmp_path / "file"):
        pass


def test_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "folder"
    with pytest.raises(InputError, match="cannot be written"), atomic_directory(below):
        pass


def test_full_disk_names_the_folder_and_not_the_one_aside(tmp_path: Path) -> None:
    message = f"^{tmp_path}/folder: cannot be written \\(No space left on device\\)$"
    with (
        pytest.raises(InputError, match=message),
        atomic_directory(tmp_path / "folder") as aside,
        atomic_directory(aside / "weights"),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as of safetensors


def test_parents_of_an_unwritten_folder_are_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_directory(tmp_path / "a" / "b" / "folder"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_writable_folder_is_made(tmp_path: Path) -> None:
    assert list(writable_folder(tmp_path / "a" / "b").iterdir()) == []


def test_folder_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        writable_folder(tmp_path / "file" / "folder")


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a" / "file.json", "one")
    atomic_write_text(tmp_path / "a" / "file.json", "zwölf")
    assert (tmp_path / "a" / "file.json").read_text(encoding="utf-8") == "zwölf"
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_unwritable_text_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        atomic_write_text(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from vision_moe import atomic_directory
with atomic_directory(sys.argv[1]) as aside:
    (aside / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_directory(tmp_path / "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folder_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "run") as first:
        with atomic_directory(tmp_path / "run") as second:
            (second / "file").touch()
        assert first.is_dir()


def test_folder_that_was_being_replaced_at_the_kill_comes_back(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "good").touch()
    script = """
import os, pathlib, signal, sys
from vision_moe import atomic_directory
pathlib.Path.rename = lambda old, new: (os.rename(old, new), os.kill(os.getpid(), signal.SIGKILL))
with atomic_directory(sys.argv[1]):
    pass
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyError), atomic_directory(tmp_path / "run"):
        raise KeyError
    assert (tmp_path / "run" / "good").is_file()
