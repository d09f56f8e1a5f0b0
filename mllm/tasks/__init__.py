"""The evaluation tasks by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from mllm.tasks.base import Score, Task, TaskItem
from mllm.tasks.coco_caption import COCOCaptionTask
from mllm.tasks.custom import CustomTask
from mllm.tasks.easy_vqa import EasyVQATask
from mllm.tasks.gqa import GQATask
from mllm.tasks.mmbench import MMBenchTask
from mllm.tasks.mme import MMETask
from mllm.tasks.mmvp import MMVPTask
from mllm.tasks.pope import POPETask
from mllm.tasks.scenes import ScenesTask
from mllm.tasks.scienceqa import ScienceQATask
from mllm.tasks.seed import SEEDTask
from mllm.tasks.textvqa import TextVQATask
from mllm.tasks.vizwiz import VizWizTask
from mllm.tasks.vqav2 import VQAv2Task
from vision_moe import InputError

#: Their data are made, not read.
GENERATED = ("scenes", "scenes_compositional")

TASKS: dict[str, Callable[[str | None], Task]] = {
    "easy_vqa": EasyVQATask,
    "scenes": lambda _data: ScenesTask(),
    "scenes_compositional": lambda _data: ScenesTask(split="compositional"),
    "vqav2": VQAv2Task,
    "gqa": GQATask,
    "textvqa": TextVQATask,
    "textvqa_ocr": lambda data: TextVQATask(data, with_ocr=True),
    "vizwiz": VizWizTask,
    "pope": POPETask,
    "mme": MMETask,
    "mmbench": MMBenchTask,
    "mmbench_single": lambda data: MMBenchTask(data, circular=False),
    "scienceqa": ScienceQATask,
    "seed": SEEDTask,
    "coco_caption": COCOCaptionTask,
    "mmvp": MMVPTask,
    "custom": CustomTask,
}

__all__ = ["TASKS", "EasyVQATask", "ScenesTask", "Score", "Task", "TaskItem", "get_scorer",
           "get_task"]  # fmt: skip


def get_task(name: str, data: str | None = None) -> Task:
    """The task of that name with its data, which lie in the folder ``data`` where it has none.

    Raises:
        InputError: There is no such task, or a file of it is missing.
    """
    task = get_scorer(name, data)
    if data is not None and name in GENERATED:
        raise InputError(f"task '{name}' makes its own data and takes no --data")
    task.find_data()
    return task


def get_scorer(name: str, data: str | None = None) -> Task:
    """The task of that name, with which answers can be scored; its data need not be there.

    Raises:
        InputError: There is no such task.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"unknown task '{name}': did you mean '{nearest}'? There are {', '.join(TASKS)}"
        )
    return TASKS[name](data)
