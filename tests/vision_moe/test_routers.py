"""A router's options: training-free, uniform, balanced by a bias, and a base that is always on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vision_moe
from vision_moe import CLIPMoEModel, InputError, LowRankFFN, MoEFeedForward, RouterOptions
from vision_moe.routers import SpectralRouter

WIDTH = 8


class Constant(nn.Module):
    """An expert whose answer can be worked out by hand."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand_as(x)


def layer_of(*values: float, top_k: int = 1, **options: Any) -> MoEFeedForward:
    generator = torch.Generator().manual_seed(0)
    experts = [Constant(value) for value in values]
    return MoEFeedForward(experts, WIDTH, top_k, generator, RouterOptions(**options))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(1))


def test_base_gate_mixes_the_base_with_what_is_routed(x: Tensor) -> None:
    layer = layer_of(1.0, 3.0, 3.0, base_gate=True)
    assert layer.router.weight.shape == (2, WIDTH)
    torch.testing.assert_close(layer(x), torch.full_like(x, 2.0))      # G starts at one half
    layer.base_gate.bias.data.fill_(100.0)
    torch.testing.assert_close(layer(x), torch.full_like(x, 1.0))
    layer.base_gate.bias.data.fill_(-100.0)
    torch.testing.assert_close(layer(x), torch.full_like(x, 3.0))


def test_base_gate_is_of_each_token_and_learns(x: Tensor) -> None:
    layer = layer_of(1.0, 3.0, 3.0, base_gate=True)
    layer(x)[0].sum().backward()
    assert layer.base_gate.weight.grad.abs().sum() > 0
    layer.base_gate.weight.data.normal_()
    assert layer(x).std(dim=(0, 1)).min() > 0.1


def test_base_gate_counts_the_base_as_active() -> None:
    assert layer_of(1.0, 2.0, 3.0, 4.0, base_gate=True).num_idle_parameters() == 2


def test_expert_bias_decides_who_is_chosen_but_not_the_weights(x: Tensor) -> None:
    layer = layer_of(0.0, 0.0, 0.0, top_k=2, expert_bias=True)
    layer.expert_bias.data = torch.tensor([0.0, 50.0, 50.0])
    logits = layer.router(x).reshape(-1, 3)
    weights, chosen = layer.route(logits)
    assert set(chosen.unique().tolist()) == {1, 2}
    expected = logits[:, 1:].softmax(-1).sort(-1).values
    torch.testing.assert_close(weights.sort(-1).values, expected)


def test_expert_bias_moves_towards_an_even_load(x: Tensor) -> None:
    layer = layer_of(0.0, 0.0, 0.0, expert_bias=True)
    tokens = x.reshape(-1, WIDTH) + 3.0                    # all alike: one expert gets most
    def load() -> Tensor:
        return torch.bincount(layer.route(layer.router(tokens))[1].reshape(-1), minlength=3)

    before = load().max()
    for _ in range(400):
        layer.balance_bias(layer.router(tokens) + layer.expert_bias, rate=0.02)
    assert load().max() <= 14 < before                     # 35 tokens for 3 experts


def test_recorded_scores_are_what_the_choice_is_made_by(x: Tensor) -> None:
    layer = layer_of(0.0, 0.0, 0.0, expert_bias=True)
    layer.expert_bias.data = torch.tensor([0.0, 0.0, 50.0])
    model = nn.Sequential(layer)
    with vision_moe.record_routing(model) as record:
        model(x)
    assert record.expert_load()["0"].tolist() == [0.0, 0.0, 1.0]


def test_uniform_router_mixes_all_evenly(x: Tensor) -> None:
    layer = layer_of(0.0, 3.0, 6.0, kind="uniform")
    torch.testing.assert_close(layer(x), torch.full_like(x, 3.0))
    assert layer.num_idle_parameters() == 0


def ffn(weight: Tensor) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(WIDTH, 16, bias=False), nn.GELU(), nn.Linear(16, WIDTH))
    network[0].weight.data = weight
    return network


def test_spectral_router_sends_a_token_to_the_expert_whose_directions_it_lies_in() -> None:
    # Expert j reads the axes 2j and 2j + 1 above all others.
    experts = []
    for j in range(3):
        scales = torch.full((WIDTH,), 0.1)
        scales[2 * j : 2 * j + 2] = 5.0
        orthogonal = torch.linalg.qr(torch.randn(16, WIDTH))[0]
        experts.append(ffn(orthogonal * scales))
    router = SpectralRouter(WIDTH, 3, rank=2)
    router.fit(experts)
    axes = torch.eye(WIDTH)[:6]
    assert router(axes).argmax(-1).tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(router(axes).max(-1).values, torch.ones(6))


def test_spectral_router_reads_low_rank_experts_as_full_ones() -> None:
    base = ffn(torch.randn(16, WIDTH))
    stage = LowRankFFN(base, rank=2)
    for parameter in stage.deltas.parameters():
        parameter.data.normal_()
    change = stage.deltas["0"]
    full = ffn(base[0].weight.data + change.b.data @ change.a.data)
    low_rank = vision_moe.LowRankExperts(base, [stage.deltas.state_dict()])
    routers = [SpectralRouter(WIDTH, 2, rank=3) for _ in range(2)]
    routers[0].fit(low_rank)
    routers[1].fit([base, full])
    x = torch.randn(20, WIDTH)
    # Worst error measured: 0.
    torch.testing.assert_close(routers[0](x), routers[1](x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        RouterOptions(kind="spectral", rank=3),
        RouterOptions(kind="uniform"),
        RouterOptions(expert_bias=True, base_gate=True),
        RouterOptions(kind="spectral", expert_bias=True, base_gate=True),
    ],
)
def test_options_survive_saving(
    dense_clip: CLIPMoEModel,
    perturb: Any,
    options: RouterOptions,
    pixel_values: Tensor,
    tmp_path: Path,
) -> None:
    base = vision_moe.ffn_state_dict(dense_clip)
    moe = vision_moe.upcycle(dense_clip, [base, perturb(base, 1), perturb(base, 2)], 2,
                             router=options)  # fmt: skip
    vision_moe.save(moe, tmp_path / "clip")
    loaded = vision_moe.load(tmp_path / "clip")
    assert torch.equal(loaded.encode_image(pixel_values), moe.encode_image(pixel_values))
    tower = vision_moe.CLIPMoEVisionModel.from_pretrained(tmp_path / "clip")
    # Worst error measured: 0.
    torch.testing.assert_close(
        tower(pixel_values).pooler_output @ moe.visual.proj,
        moe.encode_image(pixel_values), atol=1e-5, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("options", [RouterOptions(expert_bias=True, base_gate=True),
                                     RouterOptions(kind="spectral", base_gate=True)])  # fmt: skip
def test_identical_experts_equal_the_dense_model(
    dense_clip: CLIPMoEModel, options: RouterOptions, pixel_values: Tensor
) -> None:
    dense = dense_clip.encode_image(pixel_values)
    base = vision_moe.ffn_state_dict(dense_clip)
    moe = vision_moe.upcycle(dense_clip, [base] * 4, 2, router=options)
    # Worst error measured: 5e-7.
    torch.testing.assert_close(moe.encode_image(pixel_values), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "random"}, "'random' is not linear, spectral or uniform"),
        ({"kind": "uniform", "base_gate": True}, "a uniform router chooses nothing"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RouterOptions(**options)


def test_top_k_counts_what_is_routed() -> None:
    with pytest.raises(InputError, match="from 1 to the 2 experts beside the base"):
        layer_of(1.0, 2.0, 3.0, top_k=3, base_gate=True)


def test_unknown_option_in_a_folder_is_refused(moe_clip: CLIPMoEModel, tmp_path: Path) -> None:
    assert moe_clip.config.moe is not None
    moe_clip.config.moe["router"] = {"gate": 1}
    vision_moe.save(moe_clip, tmp_path / "clip")
    with pytest.raises(InputError, match="moe.router: .*'gate'"):
        vision_moe.load(tmp_path / "clip")


def test_leaving_out_counts_from_the_base(dense_clip: CLIPMoEModel, pixel_values: Tensor) -> None:
    base = vision_moe.ffn_state_dict(dense_clip)
    moe = vision_moe.upcycle(
        dense_clip, [base] * 3, 1, router=RouterOptions(base_gate=True), text_layers=[]
    )
    with vision_moe.without_expert(moe, 2), vision_moe.record_routing(moe) as record:
        moe.encode_image(pixel_values)
    assert all(load.tolist() == [1.0, 0.0] for load in record.expert_load().values())
    with pytest.raises(ValueError, match="always on"), vision_moe.without_expert(moe, 0):
        pass
