"""Learning-rate schedules: linear warm-up, then cosine, linear or no decay."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from train.recipe import Schedule


def learning_rate_schedule(
    optimizer: Optimizer, schedule: Schedule, warmup_steps: int, steps: int
) -> LambdaLR:
    """Scale the rate of every parameter group, which are peaks, from step to step.

    No step is spent at a rate of zero: warm-up begins at ``1 / warmup_steps`` of the peak, and the
    decay would reach zero one step after the last.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if schedule == "linear" else 1.0

    return LambdaLR(optimizer, factor)
