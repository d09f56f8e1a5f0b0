"""``mllm`` that is stopped after ``STOP_AFTER_STEPS`` steps, as by a signal; without, as it is."""

import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from mllm.cli import main
from train.engine import WholeCheckpointTrainer


def run(check: Callable[[nn.Module], None] = lambda model: None) -> None:
    """Args: ``check``: Of the model, at every checkpoint of a run that is stopped."""
    if "STOP_AFTER_STEPS" in os.environ:
        _stop_early(int(os.environ["STOP_AFTER_STEPS"]), check)
    main(sys.argv[1:])


def _stop_early(steps: int, check: Callable[[nn.Module], None]) -> None:
    original = WholeCheckpointTrainer._save_checkpoint

    def save(self: Any, *arguments: Any) -> None:
        check(self.model)
        original(self, *arguments)
        if self.state.global_step == steps:
            raise KeyboardInterrupt

    WholeCheckpointTrainer._save_checkpoint = save  # type: ignore[method-assign]


if __name__ == "__main__":
    run()
