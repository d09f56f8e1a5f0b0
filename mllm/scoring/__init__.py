"""Scores as pure functions of texts; no model is involved, and no torch is loaded.

One file a family of benchmarks. Names resolve on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm.scoring.captions import CiderScores, caption_words, cider
    from mllm.scoring.exact import exact_match, normalize_answer
    from mllm.scoring.gqa import gqa_correct
    from mllm.scoring.mmbench import mmbench_circular, mmbench_option
    from mllm.scoring.mme import (
        MME_COGNITION,
        MME_PERCEPTION,
        mme_answer,
        mme_intervals,
        mme_scores,
    )
    from mllm.scoring.pope import pope_answer, pope_intervals, pope_metrics, pope_scores
    from mllm.scoring.scienceqa import scienceqa_accuracy, scienceqa_option
    from mllm.scoring.seed import seed_correct
    from mllm.scoring.statistics import (
        Interval,
        bootstrap_interval,
        mcnemar_p_value,
        paired_bootstrap_interval,
        unpaired_bootstrap_interval,
    )
    from mllm.scoring.vqa import (
        normalize_textvqa_answer,
        normalize_vqa_answer,
        textvqa_accuracy,
        vqa_accuracy,
    )

__all__ = [
    "MME_COGNITION",
    "MME_PERCEPTION",
    "CiderScores",
    "Interval",
    "bootstrap_interval",
    "caption_words",
    "cider",
    "exact_match",
    "gqa_correct",
    "mcnemar_p_value",
    "mmbench_circular",
    "mmbench_option",
    "mme_answer",
    "mme_intervals",
    "mme_scores",
    "normalize_answer",
    "normalize_textvqa_answer",
    "normalize_vqa_answer",
    "paired_bootstrap_interval",
    "pope_answer",
    "pope_intervals",
    "pope_metrics",
    "pope_scores",
    "scienceqa_accuracy",
    "scienceqa_option",
    "seed_correct",
    "textvqa_accuracy",
    "unpaired_bootstrap_interval",
    "vqa_accuracy",
]

_MODULES = {
    "captions": ("CiderScores", "caption_words", "cider"),
    "exact": ("exact_match", "normalize_answer"),
    "gqa": ("gqa_correct",),
    "mmbench": ("mmbench_circular", "mmbench_option"),
    "mme": ("MME_COGNITION", "MME_PERCEPTION", "mme_answer", "mme_intervals", "mme_scores"),
    "pope": ("pope_answer", "pope_intervals", "pope_metrics", "pope_scores"),
    "scienceqa": ("scienceqa_accuracy", "scienceqa_option"),
    "seed": ("seed_correct",),
    "statistics": (
        "Interval",
        "bootstrap_interval",
        "mcnemar_p_value",
        "paired_bootstrap_interval",
        "unpaired_bootstrap_interval",
    ),
    "vqa": (
        "normalize_textvqa_answer",
        "normalize_vqa_answer",
        "textvqa_accuracy",
        "vqa_accuracy",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"mllm.scoring.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'mllm.scoring' has no attribute {name!r}")
