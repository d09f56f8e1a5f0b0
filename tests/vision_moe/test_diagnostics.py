"""Diagnostics of experts, on cases whose answers are worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vision_moe
from vision_moe import CLIPMoEModel, LowRankExperts, MoEFeedForward
from vision_moe.diagnostics import (
    complementarity,
    debiased_linear_cka,
    mutual_information,
    oracle_gap,
    routing_agreement,
    routing_statistics,
    subspace_overlap,
    weight_delta_cosines,
)


def bits(*rows: str) -> np.ndarray:
    return np.array([[one == "1" for one in row] for row in rows])


# --- oracle and pairs ----------------------------------------------------------------------------


def test_capture_is_the_share_of_the_way_to_the_oracle() -> None:
    gap = oracle_gap(bits("11000000", "11110000", "00001100"), bits("11111000")[0])
    assert (gap.oracle, gap.best_single, gap.mixture) == (0.75, 0.5, 0.625)
    assert gap.capture == 0.5


def test_no_way_to_go_is_no_capture() -> None:
    assert oracle_gap(bits("10", "10"), bits("11")[0]).capture is None


def test_pairs_worked_out_by_hand() -> None:
    pairs = complementarity(bits("11110000", "11001100"))
    assert pairs.disagreement[0, 1] == 0.5
    assert pairs.double_fault[0, 1] == 0.25
    assert pairs.kappa[0, 1] == pytest.approx(0.0)  # independent
    np.testing.assert_allclose(np.diag(pairs.kappa), 1.0)


def test_opposite_models_have_a_kappa_of_minus_one() -> None:
    assert complementarity(bits("1010", "0101")).kappa[0, 1] == pytest.approx(-1.0)


def test_models_that_answer_all_agree() -> None:
    assert complementarity(bits("11", "11")).kappa[0, 1] == 1.0


# --- geometry ------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cka_of_a_rotation_is_one() -> None:
    x = randn(50, 8)
    rotation = torch.linalg.qr(randn(8, 8, seed=1)).Q
    assert debiased_linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1.0, abs=1e-6)


def test_cka_of_independent_features_is_about_nothing_however_wide() -> None:
    values = [
        debiased_linear_cka(randn(40, 200, seed=2 * seed), randn(40, 200, seed=2 * seed + 1))
        for seed in range(20)
    ]
    assert abs(float(np.mean(values))) < 0.05  # the biased one is 0.83 here


def test_overlap_of_subspaces_worked_out_by_hand() -> None:
    scale = torch.tensor([9.0, 8.0, 1.0, 1.0])
    one = randn(4000, 4) * scale
    assert subspace_overlap(one, one, 2) == pytest.approx(1.0)
    # The first two directions of the one and of the other share one axis of two.
    assert subspace_overlap(one, randn(4000, 4, seed=1) * scale[[0, 3, 2, 1]], 2) == (
        pytest.approx(0.5, abs=0.01)
    )


def ffn(value: float, direction: int) -> nn.Sequential:
    """Weights of 1, and one of them more by ``value``."""
    module = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2))
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    with torch.no_grad():
        module[0].weight[direction, 0] += value
    return module


def test_cosines_of_weight_changes() -> None:
    layer = MoEFeedForward([ffn(0, 0), ffn(1, 0), ffn(-2, 0), ffn(1, 1), ffn(0, 0)], 2, 1)
    (cosines,) = weight_delta_cosines(nn.Sequential(layer)).values()
    np.testing.assert_allclose(cosines[:3, :3], [[1, -1, 0], [-1, 1, 0], [0, 0, 1]], atol=1e-12)
    assert np.isnan(cosines[3]).all()


def test_low_rank_changes_have_the_cosines_of_the_full_ones() -> None:
    base = ffn(0, 0)
    generator = torch.Generator().manual_seed(0)
    stages = [vision_moe.LowRankFFN(ffn(0, 0), 2, generator) for _ in range(3)]
    for stage in stages:
        for parameter in stage.deltas.parameters():
            nn.init.normal_(parameter, generator=generator)
    low = MoEFeedForward(LowRankExperts(base, [one.deltas.state_dict() for one in stages]), 2, 1)
    experts = [ffn(0, 0) for _ in range(4)]
    for expert, stage in zip(experts[1:], stages, strict=True):
        for name, delta in stage.deltas.items():
            linear: Any = expert.get_submodule(name)
            linear.weight.data += (delta.b @ delta.a).detach()  # type: ignore[operator]
            linear.bias.data += delta.bias.detach()  # type: ignore[union-attr]
    full = MoEFeedForward(experts, 2, 1)
    (one,), (two,) = (weight_delta_cosines(nn.Sequential(x)).values() for x in (low, full))
    np.testing.assert_allclose(one, two, atol=1e-6)


# --- routing -------------------------------------------------------------------------------------


def test_even_routing() -> None:
    statistics = routing_statistics(np.array([5, 5, 5, 5]), token_entropy=float(np.log(4)))
    assert statistics.load == (0.25,) * 4
    assert statistics.load_entropy == pytest.approx(1.0)
    assert statistics.token_entropy == pytest.approx(1.0)
    assert (statistics.max_violation, statistics.num_dead) == (0.0, 0)


def test_routing_to_one_expert() -> None:
    statistics = routing_statistics(np.array([0, 8, 0, 0]), token_entropy=0.0)
    assert statistics.load_entropy == 0.0 and statistics.token_entropy == 0.0
    assert (statistics.max_violation, statistics.num_dead) == (3.0, 3)


def test_expert_that_names_the_value_tells_all_its_bits() -> None:
    assert mutual_information(np.diag([10_000] * 4)) == pytest.approx(2.0, abs=1e-3)


def test_expert_that_knows_nothing_tells_nothing() -> None:
    rng = np.random.default_rng(0)
    values, experts = rng.integers(4, size=(2, 400))
    counts = np.zeros((4, 4))
    np.add.at(counts, (values, experts), 1)
    assert mutual_information(counts) < 0.01  # without the correction 0.017
    assert mutual_information(np.zeros((2, 2))) == 0.0


def test_agreement_does_not_depend_on_the_experts_names() -> None:
    one = np.array([0, 0, 1, 1, 2, 2])
    assert routing_agreement(one, (one + 1) % 3, 3) == 1.0
    assert routing_agreement(one, np.array([1, 1, 0, 2, 2, 0]), 3) == pytest.approx(4 / 6)


# --- a model -------------------------------------------------------------------------------------


def test_expert_that_is_left_out_serves_no_token(
    moe_clip: CLIPMoEModel, pixel_values: torch.Tensor
) -> None:
    with torch.inference_mode():
        before = moe_clip.encode_image(pixel_values)
        with vision_moe.without_expert(moe_clip, 1):
            without = moe_clip.encode_image(pixel_values)
            for layer in vision_moe.moe_layers(moe_clip).values():
                assert isinstance(layer.experts, nn.ModuleList)
                for parameter in layer.experts[1].parameters():
                    parameter.data.fill_(torch.nan)
            again = moe_clip.encode_image(pixel_values)
        assert torch.equal(without, again) and not torch.equal(without, before)


@pytest.mark.parametrize("expert", [4, -1])
def test_only_an_expert_can_be_left_out(moe_clip: CLIPMoEModel, expert: int) -> None:
    with (
        pytest.raises(ValueError, match="cannot be left out"),
        vision_moe.without_expert(moe_clip, expert),
    ):
        pass
