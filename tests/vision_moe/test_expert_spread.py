"""Experts nearer to their mean: by hand, and low-rank ones against whole ones."""

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vision_moe import LowRankExperts, LowRankFFN, spread_experts, spread_low_rank_experts

WIDTH, RANK = 8, 3


def test_each_keeps_a_share_of_its_distance_from_the_mean() -> None:
    experts = [{"w": torch.tensor([0.0, 3.0])}, {"w": torch.tensor([4.0, 5.0])}]
    pulled = [one["w"].tolist() for one in spread_experts(experts, 0.25)]
    assert pulled == [[1.5, 3.75], [2.5, 4.25]]


def test_a_share_of_the_base_goes_into_each_before() -> None:
    experts = [{"w": torch.tensor([2.0])}, {"w": torch.tensor([10.0])}]
    assert [one["w"].item() for one in spread_experts(experts, 1.0, 0.25)] == [2, 8]
    assert [one["w"].item() for one in spread_experts(experts, 0.5, 0.25)] == [3.5, 6.5]


@pytest.mark.parametrize("base_share", [0.0, 0.25])
def test_networks_that_the_base_alone_has_stay_as_they_are(base_share: float) -> None:
    whole = {"w": torch.tensor([2.0]), "other": torch.tensor([7.0])}
    base, trained = spread_experts([whole, {"w": torch.tensor([10.0])}], 0.5, base_share)
    assert base["other"].item() == 7
    assert trained.keys() == {"w"}
    assert (base["w"] + trained["w"]).item() == 12 - 8 * base_share


def test_whole_spread_changes_no_bit() -> None:
    experts = [{"w": torch.randn(9)} for _ in range(3)]
    for before, after in zip(experts, spread_experts(experts, 1.0), strict=True):
        assert torch.equal(before["w"], after["w"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base_share", [0.0, 0.3])
@pytest.mark.parametrize("spread", [0.0, 0.4, 1.0])
def test_low_rank_experts_are_pulled_as_whole_ones_are(
    bias: bool, spread: float, base_share: float
) -> None:
    torch.manual_seed(0)
    base = Mlp(WIDTH, 2 * WIDTH, bias=bias)
    changes = [random_change(base) for _ in range(3)]
    whole = [base.state_dict()]
    for change in changes:
        state = {name: weight.clone() for name, weight in base.state_dict().items()}
        for name in ("fc1", "fc2"):
            state[f"{name}.weight"] += change[f"{name}.b"] @ change[f"{name}.a"]
            if bias:
                state[f"{name}.bias"] += change[f"{name}.bias"]
        whole.append(state)
    pulled, *pulled_changes = spread_low_rank_experts(
        base.state_dict(), changes, spread, base_share
    )
    ours = LowRankExperts(load(base, pulled), pulled_changes)
    x = torch.randn(5, WIDTH)
    for number, state in enumerate(spread_experts(whole, spread, base_share)):
        alone = ours.mix(x, torch.ones(5, 1), torch.full((5, 1), number))
        torch.testing.assert_close(alone, load(base, state)(x))


def random_change(base: nn.Module) -> dict[str, Tensor]:
    deltas = LowRankFFN(copy.deepcopy(base), RANK).deltas
    for parameter in deltas.parameters():
        nn.init.normal_(parameter, std=0.3)
    return deltas.state_dict()


def load(base: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    network = copy.deepcopy(base)
    network.load_state_dict(state)
    return network.eval()
