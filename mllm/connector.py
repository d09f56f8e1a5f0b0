"""A start for the connector, before the language model takes part.

The first layer of LLaVA's two-layer projector becomes a random projection of the standardised
features, the second is the ridge solution from its GELU to the target embeddings: one pass over the
data and one 576x576 solve. Regression then trains both layers from there.

n patches, V vision width, H hidden width, D width of the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

_CHUNK = 16_384


@torch.no_grad()
def ridge_start(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    targets: Tensor,
    ridge: float = 3e-2,
    seed: int = 0,
) -> float:
    """Set the projector's weights so that it maps ``features`` to ``targets``, in closed form.

    Args:
        projector: ``linear_1`` (V to H), GELU, ``linear_2`` (H to D), with biases.
        features: ``(n, V)`` patch features.
        targets: ``(n, D)`` embeddings that they should become.
        ridge: Penalty for each sample, relative to the mean square of the hidden units.
        seed: Of the random projection.

    Returns:
        The share of the targets' variance that the ridge solution explains.
    """
    first, second = projector.linear_1, projector.linear_2
    set_random_features(first, features, seed)
    hidden = [projector.act(first(chunk.to(first.weight))) for chunk in features.split(_CHUNK)]
    weight, bias, explained = solve_ridge(torch.cat(hidden), targets, ridge)
    second.weight.copy_(weight)
    second.bias.copy_(bias)
    return explained


def regress(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    targets: Tensor,
    steps: int = 600,
    batch_size: int = 2048,
    lr: float = 3e-3,
    seed: int = 0,
) -> float:
    """Train the projector alone to map ``features`` to ``targets``, by least squares.

    What the random features of :func:`ridge_start` cannot separate, the first layer learns to. A
    step costs a thousandth of one through a language model.

    Args:
        projector: Changed in place.
        features: ``(n, V)``.
        targets: ``(n, D)``.
        steps: Of AdamW, on a cosine.
        batch_size: Samples of a step.
        lr: At the peak.
        seed: Of the draws.

    Returns:
        The share of the targets' variance that the projector explains.
    """
    parameters = list(projector.parameters())
    required = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    where = parameters[0]
    variance = targets.var(0, correction=0).mean().clamp(min=1e-12)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in tqdm(range(steps), desc="connector start", unit="step", delay=2):
            chosen = torch.randint(len(features), (batch_size,), generator=generator)
            output = projector(features[chosen].to(where))
            loss = (output - targets[chosen].to(where)).square().mean() / variance.to(where)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for parameter, requires_grad in zip(parameters, required, strict=True):
        parameter.requires_grad_(requires_grad)
    with torch.no_grad():
        errors = [
            (projector(x.to(where)).cpu() - y).square().sum()
            for x, y in zip(features.split(_CHUNK), targets.split(_CHUNK), strict=True)
        ]
    return 1 - float(torch.stack(errors).sum() / targets.numel() / variance)


@torch.no_grad()
def set_random_features(linear: nn.Linear, features: Tensor, seed: int) -> None:
    """Give ``linear`` random weights whose outputs on ``features`` have about unit variance.

    Args:
        linear: V to H, with bias.
        features: ``(n, V)``, whose standardisation is folded into the weights.
        seed: Of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    num_out, num_in = linear.weight.shape
    projection = torch.randn(num_out, num_in, generator=generator, dtype=torch.float64)
    offset = torch.randn(num_out, generator=generator, dtype=torch.float64)
    mean = features.double().mean(0).cpu()
    deviation = features.double().std(0, correction=0).cpu().clamp(min=1e-6)
    weight = projection / num_in**0.5 / deviation
    linear.weight.copy_(weight)
    linear.bias.copy_(offset - weight @ mean)


def solve_ridge(inputs: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Linear regression with an unpenalised intercept, by float64 normal equations.

    Minimises ``|targets - inputs W' - b|^2 + n * ridge * mean_square * |W|^2`` where
    ``mean_square`` is that of the centred inputs, so that ``ridge`` has no unit.

    Args:
        inputs: ``(n, H)``.
        targets: ``(n, D)``.
        ridge: Relative penalty, above zero.

    Returns:
        weight ``(D, H)``, bias ``(D,)``, and the explained share of the targets' variance.
    """
    num_samples, width = inputs.shape
    mean_in, mean_out = inputs.double().mean(0), targets.double().mean(0)
    gram = inputs.new_zeros(width, width, dtype=torch.float64)
    cross = inputs.new_zeros(width, targets.shape[1], dtype=torch.float64)
    total = 0.0
    for x, y in zip(inputs.split(_CHUNK), targets.split(_CHUNK), strict=True):
        centred_in, centred_out = x.double() - mean_in, y.double() - mean_out
        gram += centred_in.T @ centred_in
        cross += centred_in.T @ centred_out
        total += float(centred_out.square().sum())
    penalty = ridge * gram.diagonal().mean()
    system = gram + penalty * torch.eye(width, dtype=torch.float64, device=gram.device)
    solution = torch.linalg.solve(system, cross)  # (H, D)
    residual = total - 2 * float((solution * cross).sum())
    residual += float((solution * (gram @ solution)).sum())
    explained = 1 - residual / max(total, 1e-300)
    return solution.T, mean_out - solution.T @ mean_in, explained
