"""What shows that experts are diverse and complementary, as pure functions.

S models (experts by themselves), N queries, D width, B batch, L tokens, E experts, V values of a
factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from vision_moe.low_rank import LowRankExperts
from vision_moe.routing import moe_layers


@dataclass(frozen=True)
class OracleGap:
    """Shares of the queries, 0 to 1, that are answered.

    Attributes:
        oracle: By any of the models.
        best_single: By the best of them.
        mixture: By the mixture of experts.
    """

    oracle: float
    best_single: float
    mixture: float

    @property
    def capture(self) -> float | None:
        """How much of the way from the best model to the oracle the mixture goes; ``None`` where
        there is no way to go.  Any several models make an oracle: only what it exceeds that of
        models that differ in their seeds by is due to diversity."""
        way = self.oracle - self.best_single
        return (self.mixture - self.best_single) / way if way > 0 else None


def oracle_gap(hits: np.ndarray, mixture: np.ndarray) -> OracleGap:
    """See :class:`OracleGap`.

    Args:
        hits: ``(S, N)`` bool, which model answers which query.
        mixture: ``(N,)`` bool.
    """
    return OracleGap(
        float(hits.any(axis=0).mean()), float(hits.mean(axis=1).max()), float(mixture.mean())
    )


@dataclass(frozen=True)
class Complementarity:
    """How pairs of models err, ``(S, S)`` each.

    Attributes:
        disagreement: Share of the queries that one of both answers.
        double_fault: Share that neither answers.
        kappa: Cohen's: agreement beyond that of independent models with the same shares; 1 is
            equal errors, 0 independent ones.
    """

    disagreement: np.ndarray
    double_fault: np.ndarray
    kappa: np.ndarray


def complementarity(hits: np.ndarray) -> Complementarity:
    """See :class:`Complementarity`; ``hits`` ``(S, N)`` bool."""
    right = hits.astype(np.float64)
    wrong = 1 - right
    num_queries = hits.shape[1]
    both_wrong = wrong @ wrong.T / num_queries
    agreement = right @ right.T / num_queries + both_wrong
    share = right.mean(axis=1)
    chance = np.outer(share, share) + np.outer(1 - share, 1 - share)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Two models that answer all, or none, agree fully: by chance, as it were.
        kappa = np.where(chance < 1, (agreement - chance) / (1 - chance), 1.0)
    return Complementarity(1 - agreement, both_wrong, kappa)


def debiased_linear_cka(one: Tensor, two: Tensor) -> float:
    """Similarity of two representations of the same N inputs, unbiased by their width.

    Linear CKA with the unbiased HSIC (Nguyen et al., arXiv 2010.15327; Song et al. 2012): 1 where
    the one is a rotation of the other, about 0 where they are independent, whatever D is against N.

    Args:
        one: ``(N, D)``, N at least 4.
        two: ``(N, D')``.
    """
    return float(_hsic(one, two) / (_hsic(one, one) * _hsic(two, two)).sqrt())


def _hsic(one: Tensor, two: Tensor) -> Tensor:
    k, m = (_gram_without_diagonal(x) for x in (one, two))
    n = len(k)
    ones = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + ones - 2 / (n - 2) * (k.sum(0) @ m.sum(0))) / (n * (n - 3))


def _gram_without_diagonal(x: Tensor) -> Tensor:
    centred = x.double() - x.double().mean(0)
    gram = centred @ centred.T
    return gram - torch.diag(gram.diagonal())


def subspace_overlap(one: Tensor, two: Tensor, num_components: int = 10) -> float:
    """Share, 0 to 1, of the span of the first principal directions that two sets of features have
    in common: the mean squared cosine of the angles between both spans.

    Args:
        one: ``(N, D)``.
        two: ``(N, D)``, in the same space.
        num_components: How many directions.
    """
    num_components = min(num_components, *one.shape, *two.shape)
    bases = []
    for x in (one, two):
        centred = x.double() - x.double().mean(0)
        bases.append(torch.linalg.svd(centred, full_matrices=False).Vh[:num_components])
    return float((bases[0] @ bases[1].T).square().sum() / num_components)


def weight_delta_cosines(model: nn.Module) -> dict[str, np.ndarray]:
    """For each MoE layer ``(E - 1, E - 1)``: cosines between what sets experts 1 and up apart from
    expert 0, all their weights in one vector; NaN for an expert that is expert 0."""
    cosines = {}
    for name, layer in moe_layers(model).items():
        products = np.zeros((layer.num_experts - 1,) * 2)
        for deltas in _weight_deltas(layer.experts):
            flat = torch.stack([delta.detach().double().flatten() for delta in deltas])
            products += (flat @ flat.T).cpu().numpy()
        norm = np.sqrt(products.diagonal())
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines[name] = products / np.outer(norm, norm)
    return cosines


def _weight_deltas(experts: nn.ModuleList | LowRankExperts) -> list[list[Tensor]]:
    """For each weight of an expert what experts 1 and up add to it."""
    if isinstance(experts, LowRankExperts):
        deltas: list[list[Tensor]] = []
        for change in experts.deltas.values():
            a, b, bias = change.a, change.b, change.bias
            deltas.append([b[e] @ a[e] for e in range(len(a))])  # type: ignore[index, arg-type]
            if bias is not None:
                deltas.append(list(bias))  # type: ignore[arg-type]
        return deltas
    first = dict(experts[0].named_parameters())
    others = [dict(expert.named_parameters()) for expert in list(experts)[1:]]
    return [[other[name] - weight for other in others] for name, weight in first.items()]


@dataclass(frozen=True)
class RoutingStatistics:
    """How a block's router shares tokens out.

    Attributes:
        load: ``(E,)`` share of the choices that fell on each expert.
        load_entropy: Of ``load`` by log E: 1 is even, 0 is one expert alone.
        max_violation: How far the busiest expert exceeds an even share, in shares: 0 is even.
        num_dead: Experts that no token chose.
        token_entropy: Mean entropy of a token's probabilities by log E: 0 is a router that is sure.
    """

    load: tuple[float, ...]
    load_entropy: float
    max_violation: float
    num_dead: int
    token_entropy: float


def routing_statistics(load_counts: np.ndarray, token_entropy: float) -> RoutingStatistics:
    """From how often each expert was chosen, ``(E,)``, and the mean entropy of a token in nats."""
    num_experts = len(load_counts)
    load = load_counts / max(load_counts.sum(), 1)
    return RoutingStatistics(
        load=tuple(load.tolist()),
        load_entropy=_entropy(load) / np.log(num_experts) if num_experts > 1 else 1.0,
        max_violation=float(load.max() * num_experts - 1),
        num_dead=int((load_counts == 0).sum()),
        token_entropy=token_entropy / float(np.log(num_experts)) if num_experts > 1 else 0.0,
    )


def mutual_information(counts: np.ndarray) -> float:
    """Of a table of counts ``(V, E)``, in bits, less what chance alone gives a table of its size
    (Miller and Madow); not below 0."""
    total = counts.sum()
    if total == 0:
        return 0.0
    joint = counts / total
    plain = _entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint.ravel())
    rows, columns = (counts.sum(1) > 0).sum(), (counts.sum(0) > 0).sum()
    chance = (rows - 1) * (columns - 1) / (2 * total)
    return float(max(plain - chance, 0.0) / np.log(2))


def _entropy(share: np.ndarray) -> float:
    positive = share[share > 0]
    return float(-(positive * np.log(positive)).sum())


def routing_agreement(one: np.ndarray, two: np.ndarray, num_experts: int) -> float:
    """Share of the tokens that two routers send alike, the experts of the second renamed so that
    it is the largest.

    Args:
        one: ``(T,)`` each token's first choice.
        two: ``(T,)``.
        num_experts: E; unrelated even routers agree on a little more than 1 / E.
    """
    both = np.zeros((num_experts, num_experts))
    np.add.at(both, (one, two), 1)
    rows, columns = linear_sum_assignment(-both)
    return float(both[rows, columns].sum() / len(one))
