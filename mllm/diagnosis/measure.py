"""The measurements: experts by themselves, together, and one left out.

S experts by themselves, N queries, P dimensions of the common space.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mllm.diagnosis.data import DiagnosticData
from mllm.scoring.statistics import paired_bootstrap_interval
from vision_moe import (
    CLIPMoEModel,
    InputError,
    diagnostics,
    encode_images,
    encode_texts,
    force_expert,
    moe_layers,
    retrieval_ranks,
    routing_survey,
    uniform_routing,
    without_expert,
)

I2T, T2I = "picture to text", "text to picture"
ROUTED, UNIFORM = "routed", "uniform"
#: A Gram matrix of more rows takes long and tells no more.
_MAX_ROWS = 2000


@dataclass(frozen=True)
class Measured:
    """One way to run the model.

    Attributes:
        image: ``(I, P)`` features.
        text: ``(T, P)``.
        hits: For both directions of retrieval (rank 1), and each attribute, whether each query is
            answered, ``(N,)`` bool.
    """

    image: Tensor
    text: Tensor
    hits: dict[str, np.ndarray]

    def shares(self) -> dict[str, float]:
        return {name: float(one.mean()) for name, one in self.hits.items()}


@dataclass(frozen=True)
class Difference:
    """Of two shares, with its 95 % interval (paired bootstrap)."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Diagnosis:
    """What a diagnosis finds; ``experts`` are named ``expert 0`` and so on.

    Attributes:
        data: Name and size.
        shares: For each expert by itself, the routed and the uniform mixture: the shares answered.
        against_base: For each expert but the first, what it answers more than expert 0.
        oracle: For each kind of query.
        control_oracle: The same of a control, models that differ in their seeds, if one was given.
        complementarity: For each kind of retrieval, disagreement, double fault and kappa,
            ``(S, S)``.
        cka: Debiased linear CKA of the experts' features, ``(S, S)``, by tower.
        subspaces: Overlap of their principal subspaces.
        weight_cosines: For each block, ``(E - 1, E - 1)``.
        survey: Where the routers send tokens.
        agreement: With the control's routers, by block.
        leave_one_out: For each expert, what the mixture answers less without it.
    """

    data: dict[str, Any]
    shares: dict[str, dict[str, float]]
    against_base: dict[str, dict[str, Difference]]
    oracle: dict[str, diagnostics.OracleGap]
    control_oracle: dict[str, diagnostics.OracleGap] | None
    complementarity: dict[str, dict[str, np.ndarray]]
    cka: dict[str, np.ndarray]
    subspaces: dict[str, np.ndarray]
    weight_cosines: dict[str, np.ndarray]
    survey: routing_survey.Survey
    agreement: dict[str, float] | None
    leave_one_out: dict[str, dict[str, Difference]]

    @property
    def experts(self) -> list[str]:
        return [name for name in self.shares if name.startswith("expert")]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "data": self.data,
            "shares": self.shares,
            "against_base": _plain(self.against_base),
            "oracle": _gaps(self.oracle),
            "control_oracle": None if self.control_oracle is None else _gaps(self.control_oracle),
            "complementarity": _plain(self.complementarity),
            "cka": _plain(self.cka),
            "subspace_overlap": _plain(self.subspaces),
            "weight_cosines": _plain(self.weight_cosines),
            "routing": {
                block: {
                    kind: {**asdict(one.statistics()), "bits_about": one.information()}
                    for kind, one in kinds.items()
                }
                for block, kinds in self.survey.items()
            },
            "agreement_with_control": self.agreement,
            "leave_one_out": _plain(self.leave_one_out),
        }


def diagnose(
    clip: CLIPMoEModel,
    data: DiagnosticData,
    control: CLIPMoEModel | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Diagnosis:
    """Try every expert by itself, the mixture, and the mixture without each expert.

    Args:
        clip: A mixture.
        data: What they are tried on.
        control: A mixture of models that differ in their seeds alone, made with as many steps: what
            its oracle gains is due to there being several models.
        batch_size: Pictures at a time.
        seed: Of the bootstrap.

    Raises:
        InputError: The model is dense, or pictures cannot be read.
    """
    num_experts = _num_experts(clip, "the model")
    experts = {f"expert {j}": _forced(clip, j) for j in range(num_experts)}
    runs: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        **experts,
        ROUTED: nullcontext,
        UNIFORM: lambda: uniform_routing(clip),
        **{f"without {j}": _without(clip, j) for j in range(num_experts)},
    }
    if num_experts < 2:
        runs.pop("without 0")
    measured: dict[str, Measured] = {}
    for name, context in tqdm(runs.items(), desc="trying the experts", unit="run"):
        with context():
            measured[name] = measure(clip, data, batch_size, negatives="without" not in name)
    solo = [measured[name] for name in experts]
    survey = _survey(clip, data, batch_size)
    control_oracle, agreement = None, None
    if control is not None:
        solo_of_control = []
        for j in range(_num_experts(control, "the control")):
            with force_expert(control, j):
                solo_of_control.append(measure(control, data, batch_size, negatives=True))
        control_oracle = _oracles(solo_of_control, measure(control, data, batch_size, True))
        agreement = routing_survey.survey_agreement(survey, _survey(control, data, batch_size))
    routed = measured[ROUTED]
    return Diagnosis(
        data={
            "name": data.name,
            "num_pictures": len(data.pictures),
            "num_captions": len(data.captions),
            "num_negatives": {name: len(one) for name, one in data.negatives.items()},
            "skipped": data.skipped,
        },
        shares={name: measured[name].shares() for name in [*experts, ROUTED, UNIFORM]},
        against_base={
            name: _differences(measured[name], solo[0], seed) for name in list(experts)[1:]
        },
        oracle=_oracles(solo, routed),
        control_oracle=control_oracle,
        complementarity={
            query: asdict(diagnostics.complementarity(np.stack([one.hits[query] for one in solo])))
            for query in (I2T, T2I)
        },
        cka=_pairwise(solo, diagnostics.debiased_linear_cka),
        subspaces=_pairwise(solo, diagnostics.subspace_overlap),
        weight_cosines=diagnostics.weight_delta_cosines(clip),
        survey=survey,
        agreement=agreement,
        leave_one_out={
            f"expert {j}": _differences(measured[f"without {j}"], routed, seed)
            for j in range(num_experts if num_experts > 1 else 0)
        },
    )


def measure(
    clip: CLIPMoEModel, data: DiagnosticData, batch_size: int, negatives: bool
) -> Measured:
    """Run the model as it is set at present."""
    images = encode_images(clip, data.pictures, batch_size, progress=False)
    if images.skipped:
        raise InputError(next(iter(images.skipped.values())))
    text = encode_texts(clip, data.captions, progress=False)
    of_caption = torch.tensor(data.image_of_caption)
    ranks = retrieval_ranks(images.features, text, of_caption)
    hits = {I2T: (ranks.i2t == 0).numpy(), T2I: (ranks.t2i == 0).numpy()}
    if negatives:
        unit_image = torch.nn.functional.normalize(images.features, dim=-1)
        unit_text = torch.nn.functional.normalize(text, dim=-1)
        for attribute, changed in data.negatives.items():
            numbers = torch.tensor([number for number, _ in changed])
            wrong = encode_texts(clip, [caption for _, caption in changed], progress=False)
            picture = unit_image[of_caption[numbers]]
            own = (picture * unit_text[numbers]).sum(-1)
            other = (picture * torch.nn.functional.normalize(wrong, dim=-1)).sum(-1)
            hits[attribute] = (own > other).numpy()
    return Measured(images.features, text, hits)


def _num_experts(clip: CLIPMoEModel, which: str) -> int:
    layers = moe_layers(clip)
    if not layers:
        raise InputError(f"{which} is dense: there are no experts to diagnose")
    return next(iter(layers.values())).num_experts


def _forced(clip: CLIPMoEModel, expert: int) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: force_expert(clip, expert)


def _without(clip: CLIPMoEModel, expert: int) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: without_expert(clip, expert)


def _survey(clip: CLIPMoEModel, data: DiagnosticData, batch_size: int) -> routing_survey.Survey:
    pictures: dict[str, np.ndarray] = {}
    for name, values in data.factors.items():
        known = sorted({value for value in values if value is not None})
        number = {value: index for index, value in enumerate(known)}
        pictures[name] = np.array([-1 if one is None else number[one] for one in values])
    of_caption = np.array(data.image_of_caption)
    texts = {name: values[of_caption] for name, values in pictures.items()}
    return routing_survey.survey_routing(
        clip, data.pictures, data.captions, pictures, texts, batch_size
    )


def _oracles(solo: list[Measured], mixture: Measured) -> dict[str, diagnostics.OracleGap]:
    return {
        query: diagnostics.oracle_gap(np.stack([one.hits[query] for one in solo]), hits)
        for query, hits in mixture.hits.items()
    }


def _differences(one: Measured, base: Measured, seed: int) -> dict[str, Difference]:
    differences = {}
    for query, hits in one.hits.items():
        a, b = hits.astype(float), base.hits[query].astype(float)
        interval = paired_bootstrap_interval(a.tolist(), b.tolist(), seed)
        differences[query] = Difference(float(a.mean() - b.mean()), interval.low, interval.high)
    return differences


def _pairwise(
    solo: list[Measured], compare: Callable[[Tensor, Tensor], float]
) -> dict[str, np.ndarray]:
    """``(S, S)`` for the features of either tower."""
    result = {}
    for tower in ("image", "text"):
        features = [getattr(one, tower)[:_MAX_ROWS] for one in solo]
        values = np.eye(len(features))
        for i, one in enumerate(features):
            for j in range(i):
                values[i, j] = values[j, i] = compare(one, features[j])
        result[tower] = values
    return result


def _gaps(gaps: dict[str, diagnostics.OracleGap]) -> dict[str, Any]:
    return {query: {**asdict(gap), "capture": gap.capture} for query, gap in gaps.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Difference):
        return asdict(value)
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
