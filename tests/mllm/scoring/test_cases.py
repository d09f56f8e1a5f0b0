"""Every worked case of ``cases/``: one file a function, one line a case with the rule it shows.

The expected values were worked out by hand from the published rules, not by running the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm import scoring

CASES = Path(__file__).parent / "cases"
# How a line's input is given to the function that its file is named after.
CALLS: dict[str, Callable[[Any], Any]] = {
    "contractions": scoring.normalize_vqa_answer,
    "gqa_correct": lambda pair: scoring.gqa_correct(*pair),
    "mmbench_option": lambda given: scoring.mmbench_option(**given),
    "mme_answer": scoring.mme_answer,
    "normalize_textvqa_answer": scoring.normalize_textvqa_answer,
    "normalize_vqa_answer": scoring.normalize_vqa_answer,
    "pope_answer": scoring.pope_answer,
    "scienceqa_option": lambda given: scoring.scienceqa_option(**given),
    "seed_correct": lambda pair: scoring.seed_correct(*pair),
    "textvqa_accuracy": lambda given: scoring.textvqa_accuracy(**given),
    "vqa_accuracy": lambda given: scoring.vqa_accuracy(**given),
}


def read_cases(name: str) -> list[dict[str, Any]]:
    lines = (CASES / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_every_worked_case(name: str) -> None:
    cases = read_cases(name)
    assert cases
    wrong = []
    for case in cases:
        got, expected = CALLS[name](case["input"]), case["expected"]
        # Fractions such as 1/3 are not exact; everything else is.
        same = abs(got - expected) < 1e-15 if isinstance(expected, float) else got == expected
        if not same:
            wrong.append(f"{case['input']!r}: {got!r}, expected {expected!r} ({case['rule']})")
    assert not wrong, "\n".join(wrong)


def test_every_table_is_read() -> None:
    assert {file.stem for file in CASES.glob("*.jsonl")} == set(CALLS)


def test_there_are_at_least_200_cases_of_normalisation_alone() -> None:
    inputs = [case["input"] for case in read_cases("normalize_vqa_answer")]
    assert len(set(inputs)) >= 200
