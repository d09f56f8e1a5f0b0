"""Cells one after the other, or side by side in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from threading import Thread

import torch

from mllm.allocator import keep_freed_memory
from train.evidence.cells import Cell
from train.evidence.methods import ALL


def finished(cells: Sequence[Cell], workers: int, out: Path) -> Iterator[Cell]:
    """Run the cells; each is given when it is done.

    Args:
        cells: A method after the one whose stages it takes.
        workers: With more than one, the progress of each goes to ``out/worker-<pid>.log``.
        out: Folder of the cells.
    """
    if workers == 1:
        for cell in cells:
            cell.run()
            yield cell
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (threads, out)
    ) as pool:
        chains = [pool.submit(_run, chain) for chain in chains_of(cells)]
        try:
            for chain in as_completed(chains):
                yield from chain.result()
        finally:
            pool.shutdown(cancel_futures=True)


def chains_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that must run one after the other: a method and, of its seed, those that take its
    stages."""
    chains: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        chains.setdefault((ALL[cell.method].stages_of or cell.method, cell.seed), []).append(cell)
    return list(chains.values())


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


def _run(chain: Sequence[Cell]) -> Sequence[Cell]:
    for cell in chain:
        cell.run()
    return chain
