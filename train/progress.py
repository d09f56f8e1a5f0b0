"""What a run shows while it goes on: a progress line, and curves for TensorBoard and the like."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.recipe import LogTo
from vision_moe import InputError


class ProgressBar(TrainerCallback):
    """Steps, time left, loss, learning rate and speed on stderr; transformers' own go to stdout.

    Args:
        description: Begins the line.
        num_skipped: How many samples have been left out so far.
    """

    def __init__(self, description: str, num_skipped: Callable[[], int] = lambda: 0) -> None:
        self.description = description
        self.num_skipped = num_skipped
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.description,
            unit="step",
            mininterval=0.5,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self.bar is not None
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(progress_text(logs, self.num_skipped()), refresh=False)

    def close(self) -> None:
        """End the bar's line: also where training was cut short and a message follows."""
        if self.bar is not None:
            self.bar.close()


def progress_text(logs: dict[str, float], num_skipped: int) -> str:
    """``loss 1.234, lr 2.0e-05, 1,234 tokens/s``, and what was skipped if anything was."""
    parts = [f"loss {logs['loss']:.3f}", f"lr {logs['learning_rate']:.1e}"]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if num_skipped:
        parts.append(f"{num_skipped:,} skipped")
    return ", ".join(parts)


def check_tracker(log_to: LogTo) -> None:
    """Notice before the run that a package is missing.

    Raises:
        InputError: ``log_to`` needs a package that is not installed.
    """
    if log_to != "none" and importlib.util.find_spec(log_to) is None:
        raise InputError(f"log_to={log_to}: the package is not installed, 'pip install {log_to}'")


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Curves below ``folder``."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))
