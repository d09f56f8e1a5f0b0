"""The evaluation tasks by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from mllm.tasks.base import Task, TaskItem
from mllm.tasks.easy_vqa import EasyVQATask
from mllm.tasks.scenes import ScenesTask
from vision_moe import InputError

TASKS: dict[str, Callable[[], Task]] = {
    "easy_vqa": EasyVQATask,
    "scenes": ScenesTask,
    "scenes_compositional": lambda: ScenesTask(split="compositional"),
}

__all__ = ["TASKS", "EasyVQATask", "ScenesTask", "Task", "TaskItem", "get_task"]


def get_task(name: str, data: str | None = None) -> Task:
    """The task of that name, on its own data or on the folder ``data``."""
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"unknown task '{name}': did you mean '{nearest}'? There are {', '.join(TASKS)}"
        )
    if data is None:
        return TASKS[name]()
    if name != "easy_vqa":
        raise InputError(f"task '{name}' makes its own data and takes no --data")
    return EasyVQATask(data)
