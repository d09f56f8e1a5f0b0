"""GQA, balanced questions (Hudson and Manning, arXiv 1902.09506), as LLaVA scores it."""

from __future__ import annotations

from mllm.scoring.checks import require_text


def gqa_correct(prediction: str, answer: str) -> bool:
    """Whether the prediction, without final full stops and in lower case, is the answer.

    The answer is taken as it stands; GQA's are in lower case.

    Raises:
        TypeError: One of both is not a string.
    """
    require_text(prediction, "the prediction")
    require_text(answer, "the answer")
    return prediction.rstrip(".").lower() == answer
