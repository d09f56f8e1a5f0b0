"""The processes that work on the cells of ``mllm bench evidence``."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from train.evidence.workers import Job
from train.evidence.workers import finished as side_by_side


@pytest.mark.skipif(sys.platform == "win32", reason="asks a POSIX shell to wait")
def test_jobs_wait_for_what_they_need_and_the_first_that_can_begins(tmp_path: Path) -> None:
    def after_a_second(script: str) -> Callable[[], object]:
        return partial(subprocess.run, ["sh", "-c", f"sleep 1; {script}"], cwd=tmp_path)

    jobs = [
        Job("long", after_a_second("sleep 3")),
        Job("made", after_a_second("echo 1 > made")),
        Job("copied", partial(shutil.copy, tmp_path / "made", tmp_path / "copied"),
            frozenset({"made"}), seed=0),
        Job("moved", partial(shutil.move, tmp_path / "copied", tmp_path / "moved"),
            frozenset({"copied"}), seed=0),
    ]  # fmt: skip
    done = [job.name for job in side_by_side(jobs, 2, tmp_path)]
    assert done == ["made", "copied", "moved", "long"]
    assert {path.name for path in tmp_path.glob("[cm]*")} == {"made", "moved"}


def test_job_that_fails_is_told(tmp_path: Path) -> None:
    jobs = [Job("lost", partial(shutil.copy, tmp_path / "nothing", tmp_path / "copied"))]
    with pytest.raises(FileNotFoundError, match="nothing"):
        list(side_by_side(jobs, 2, tmp_path))


# Begins a worker that says who it is, and would then work for a long time.
PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from train.evidence.workers import _start

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _start, (1, Path.cwd())) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 250).result()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks POSIX who is there")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, script], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(300):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie":
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker goes on")
