"""`mllm bench eval`: both ways answer the same questions and agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm.bench import evaluation
from mllm.tasks import get_task
from vision_moe import InputError


@pytest.fixture(scope="module")
def easy_vqa():
    return get_task("easy_vqa")


def test_whole_pictures_come_with_all_of_their_questions(easy_vqa):
    drawn = evaluation.whole_pictures(easy_vqa, 30, seed=0)
    keys = {item.image_key for item in drawn}
    every = [item for item in easy_vqa.all_items(0) if item.image_key in keys]
    assert {item.question_id for item in drawn} == {item.question_id for item in every}
    assert 30 <= len(drawn) < 60


def test_both_give_the_same_answers(mllm_folder: Path, monkeypatch):
    monkeypatch.setattr(evaluation, "_MAX_NEW_TOKENS", 4)
    report = evaluation.run([f"checkpoint={mllm_folder}", "num_questions=3", "repeats=1"])
    same = [fact for name, fact in report.facts.items() if "same answers" in name]
    counts = [tuple(map(int, fact.split(" (")[0].split(" of "))) for fact in same]
    assert len(counts) == 2
    assert all(equal == asked >= 3 for equal, asked in counts)
    assert all(ratio.goal == 5 for ratio in report.ratios.values())


def test_number_of_questions_below_one_is_told():
    with pytest.raises(InputError, match="at least 1"):
        evaluation.run(["num_questions=0"])
