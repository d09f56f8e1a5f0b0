"""Warm-up and decay."""

import pytest
import torch

from train.recipe import Schedule
from train.schedule import learning_rate_schedule


def rates(schedule: Schedule, warmup_steps: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = learning_rate_schedule(optimizer, schedule, warmup_steps, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warmup_reaches_the_peak() -> None:
    assert rates("constant", 4, 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates("cosine", 0, 8)[4] == pytest.approx(1.0)


def test_linear_falls_evenly() -> None:
    assert rates("linear", 0, 4) == [2.0, 1.5, 1.0, 0.5]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_no_step_is_spent_at_zero(schedule: Schedule) -> None:
    assert min(rates(schedule, 3, 10)) > 0
