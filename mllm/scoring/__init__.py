"""Scores as pure functions of texts; no model is involved."""

from mllm.scoring.exact import exact_match, normalize_answer

__all__ = ["exact_match", "normalize_answer"]
