"""``mllm.scoring`` as a package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mllm import scoring


def test_scoring_loads_no_torch() -> None:
    names = ", ".join(scoring.__all__)
    code = (
        f"import sys; from mllm.scoring import {names}; "
        "vqa_accuracy('a', ['b']); cider(['a'], [['b']]); bootstrap_interval([1.0], seed=0); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_what_its_module_calls_so() -> None:
    for name in scoring.__all__:
        value = getattr(scoring, name)
        assert getattr(value, "__name__", name) == name
        assert getattr(value, "__module__", "mllm.scoring").startswith("mllm.scoring")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'bleu'"):
        scoring.bleu  # noqa: B018
