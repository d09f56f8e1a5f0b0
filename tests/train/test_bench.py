"""``mllm bench train``: both sides learn the same from the same, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.bench import BenchReport
from train.bench import TrainOptions, measure
from train.bench_data import write_conversations
from train.bench_sides import SIDES, Answers, Job, Side, side_process
from train.bench_stock import StockCollator, stock_samples
from train.instruction_data import collate
from train.instruction_model import InstructionModel
from train.recipe import InstructionSource
from vision_moe import InputError


def job_of(part: Any, mllm_folder: Path, folder: Path, steps: int = 1) -> Job:
    if part == "instruction":
        source = InstructionSource(name="easy_vqa", num_images=12, questions_per_image=2)
    else:
        file = write_conversations(part, folder, 24, 0)
        source = InstructionSource(name="llava_json", path=str(file))
    return Job(part, source, str(mllm_folder), "fp32", steps, str(folder / "cache"))


def test_side_that_ends_early_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="'stock' ended before its answer to .* exit status 1"),
        side_process(job_of("instruction", tmp_path / "absent", tmp_path), "stock") as side,
    ):
        side.ask("num_rounds")


@pytest.mark.parametrize("part", ["instruction", "chat"])
def test_both_sides_have_the_same_loss(part: Any, mllm_folder: Path, tmp_path: Path) -> None:
    side = Side(job_of(part, mllm_folder, tmp_path), "ours")
    rows = [side.rows[row] for row in side.batches[0]]
    ours = InstructionModel(side.model)(**collate(rows, side.pictures, 0))["loss"]
    stock = StockCollator(side.processor, side.data.open_images)
    batch = stock([one for row in rows for one in stock_samples(row)])
    # Measured worst: 2e-4, from features kept in half precision.
    torch.testing.assert_close(ours, side.model(**batch).loss, rtol=2e-3, atol=0)


class InProcess:
    """Answers as a process of its own would."""

    def __init__(self, side: Side) -> None:
        self.answers = Answers(side)

    def ask(self, what: str, *arguments: Any) -> Any:
        return getattr(self.answers, what)(*arguments)


def test_report_has_a_ratio_for_each_goal(mllm_folder: Path, tmp_path: Path) -> None:
    job = job_of("instruction", mllm_folder, tmp_path)
    report = BenchReport("train")
    options = TrainOptions(repeats=1, steps=1)
    measure(report, "instruction", options, {name: InProcess(Side(job, name)) for name in SIDES})
    goals = {label.partition(": ")[2]: ratio.goal for label, ratio in report.ratios.items()}
    assert goals == {
        "speed in the first epoch": 4,
        "speed from the second on": 4,
        "input side": 1.05,
        "peak memory": 0.6,
    }
    assert all(ratio.value > 0 for ratio in report.ratios.values())


def test_training_on_all_changes_what_is_asked_for(mllm_folder: Path, tmp_path: Path) -> None:
    for name in SIDES:
        side = Side(job_of("instruction", mllm_folder, tmp_path), name)
        connector = side.model.model.multi_modal_projector
        before = connector.linear_1.weight.detach().clone()
        answers = Answers(side)
        answers.train_on_all()
        assert not torch.equal(connector.linear_1.weight, before)
        assert 0 <= answers.accuracy(4) <= 1
