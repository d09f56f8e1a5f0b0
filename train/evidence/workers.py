"""Jobs one after the other, or side by side in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from threading import Thread

import torch

from mllm.allocator import keep_freed_memory


@dataclass(frozen=True)
class Job:
    """A piece of work that leaves what it makes in a folder.

    Attributes:
        name: Its own.
        do: What a process runs.
        needs: Names of the jobs whose folders it reads.
        seed: Whose cells it is for; none for what all seeds share.
        was_done: An earlier run did it: it only looks whether all is there.
    """

    name: str
    do: Callable[[], object]
    needs: frozenset[str] = frozenset()
    seed: int | None = None
    was_done: bool = False


def finished(jobs: Sequence[Job], workers: int, out: Path) -> Iterator[Job]:
    """Run the jobs; each is given when it is done.

    Args:
        jobs: Each after those that it needs. Of several that could begin, the first does.
        workers: With more than one, the progress of each goes to ``out/worker-<pid>.log``.
        out: Folder of the logs.
    """
    if workers == 1:
        for job in jobs:
            job.do()
            yield job
        return
    by_name = {job.name: job for job in jobs}
    rank = {name: number for number, name in enumerate(by_name)}
    order = TopologicalSorter({job.name: job.needs for job in jobs})
    order.prepare()
    ready: list[str] = []
    running: dict[Future[object], str] = {}
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (threads, out)
    ) as pool:
        try:
            while order.is_active():
                ready = sorted([*ready, *order.get_ready()], key=rank.__getitem__)
                while ready and len(running) < workers:
                    name = ready.pop(0)
                    running[pool.submit(by_name[name].do)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    name = running.pop(future)
                    order.done(name)
                    yield by_name[name]
        finally:
            pool.shutdown(cancel_futures=True)


def _start(threads: int, out: Path) -> None:
    log = os.open(out / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    os.close(log)
    torch.set_num_threads(threads)
    keep_freed_memory()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would go on, beside those of the run that is begun again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
