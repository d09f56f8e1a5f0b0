"""The connector's closed-form start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from transformers import LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.connector import regress, ridge_start, set_random_features, solve_ridge


@pytest.fixture
def projector():
    config = LlavaConfig(text_config=LlamaConfig(hidden_size=96))
    config.vision_config.hidden_size = 12
    return LlavaMultiModalProjector(config)


@pytest.fixture
def data():
    """Features with very unequal scales, and targets that are a smooth function of them."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(4000, 12, generator=generator)
    mixing = torch.randn(12, 96, generator=generator)
    targets = 0.05 * torch.tanh(latent @ mixing / 4) + 0.3
    return latent * torch.logspace(-2, 2, 12) + 5.0, targets


def test_solution_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(2.0, 3.0, (500, 20)), rng.normal(1.0, 1.0, (500, 5))
    ridge = 0.01
    alpha = ridge * 500 * inputs.var(0).mean()
    expected = Ridge(alpha=alpha).fit(inputs, targets)
    weight, bias, explained = solve_ridge(
        torch.from_numpy(inputs), torch.from_numpy(targets), ridge
    )
    # Seen: 2e-15.
    np.testing.assert_allclose(weight.numpy(), expected.coef_, atol=1e-10)
    np.testing.assert_allclose(bias.numpy(), expected.intercept_, atol=1e-10)
    r2 = expected.score(inputs, targets, sample_weight=None)
    variance = targets.var(0)
    residual = ((expected.predict(inputs) - targets) ** 2).mean(0)
    assert explained == pytest.approx(1 - residual.sum() / variance.sum(), abs=1e-9)
    assert explained == pytest.approx(r2, abs=0.02)


def test_projector_beats_the_mean_by_far(projector, data):
    features, targets = data
    ridge_start(projector, features[:3000], targets[:3000])
    with torch.no_grad():
        error = (projector(features[3000:]) - targets[3000:]).square().mean()
    baseline = (targets[:3000].mean(0) - targets[3000:]).square().mean()
    assert error < 0.15 * baseline  # seen: 0.06


def test_explained_share_is_that_of_the_projector(projector, data):
    features, targets = data
    explained = ridge_start(projector, features, targets)
    with torch.no_grad():
        error = (projector(features) - targets).square().mean()
    variance = targets.var(0, correction=0).mean()
    assert explained == pytest.approx(float(1 - error / variance), abs=1e-3)


def test_regression_explains_more_than_the_closed_form(projector, data):
    features, targets = data
    closed_form = ridge_start(projector, features, targets)
    explained = regress(projector, features, targets, steps=100, batch_size=256)
    with torch.no_grad():
        error = (projector(features) - targets).square().mean()
    variance = targets.var(0, correction=0).mean()
    assert explained == pytest.approx(float(1 - error / variance), abs=1e-3)
    assert explained > closed_form


def test_regression_leaves_a_frozen_projector_frozen(projector, data):
    projector.requires_grad_(False)
    regress(projector, *data, steps=2, batch_size=8)
    assert not any(p.requires_grad for p in projector.parameters())


def test_start_depends_on_the_seed_alone(projector, data):
    weights = []
    for global_seed, seed in ((1, 7), (2, 7), (3, 8)):
        torch.manual_seed(global_seed)
        ridge_start(projector, *data, seed=seed)
        weights.append(projector.linear_1.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_random_features_are_standardised(data):
    linear = torch.nn.Linear(12, 500)
    set_random_features(linear, data[0], seed=0)
    with torch.no_grad():
        outputs = linear(data[0])
    assert float(outputs.std(0).pow(2).mean()) == pytest.approx(1.0, abs=0.15)
    assert float(outputs.mean(0).std()) == pytest.approx(1.0, abs=0.15)


def test_constant_feature_does_no_harm(projector, data):
    features = data[0].clone()
    features[:, 3] = 2.0
    ridge_start(projector, features, data[1])
    assert all(p.isfinite().all() for p in projector.parameters())
