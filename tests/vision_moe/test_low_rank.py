"""Low-rank experts against full experts with the same weights."""

import copy
from pathlib import Path

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn

import vision_moe
from vision_moe import (
    CLIPMoEConfig,
    CLIPMoEModel,
    InputError,
    LowRankExperts,
    LowRankFFN,
    MoEFeedForward,
)
from vision_moe.feed_forward import split_ffn

WIDTH, HIDDEN, RANK = 8, 24, 3

FFNS = {
    "sequential": lambda: nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, WIDTH)
    ),
    "timm": lambda: Mlp(WIDTH, HIDDEN, norm_layer=nn.LayerNorm, drop=0.1),
    "no bias": lambda: Mlp(WIDTH, HIDDEN, bias=False),
    "swiglu": lambda: SwiGLU(WIDTH, HIDDEN, norm_layer=nn.LayerNorm),
    "packed swiglu": lambda: SwiGLUPacked(WIDTH, 2 * HIDDEN),
    "gate last": lambda: GluMlp(WIDTH, 2 * HIDDEN, act_layer=nn.Sigmoid, gate_last=True),
}


@pytest.fixture(params=sorted(FFNS))
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return FFNS[request.param]().eval()


def trained_change(base: nn.Module, seed: int, rank: int = RANK) -> dict[str, Tensor]:
    ffn = LowRankFFN(copy.deepcopy(base), rank)
    generator = torch.Generator().manual_seed(seed)
    for parameter in ffn.deltas.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return ffn.deltas.state_dict()


def full_expert(base: nn.Module, change: dict[str, Tensor]) -> nn.Module:
    """The same network with the change added to its weights."""
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for name in split_ffn(base).linears:
            linear = expert.get_submodule(name)
            linear.weight += change[f"{name}.b"] @ change[f"{name}.a"]
            if linear.bias is not None:
                linear.bias += change[f"{name}.bias"]
    return expert


def pair_of_layers(base: nn.Module, top_k: int = 2) -> tuple[MoEFeedForward, MoEFeedForward]:
    """A MoE layer of low-rank experts, and one of full experts with the same weights."""
    changes = [trained_change(base, seed, rank=RANK - seed % 2) for seed in (1, 2, 3)]
    full = [copy.deepcopy(base), *(full_expert(base, change) for change in changes)]
    low_rank = LowRankExperts(copy.deepcopy(base), changes)
    seed = torch.Generator
    return (
        MoEFeedForward(low_rank, WIDTH, top_k, seed().manual_seed(0)).eval(),
        MoEFeedForward(full, WIDTH, top_k, seed().manual_seed(0)).eval(),
    )


def test_starts_as_the_base(base: nn.Module) -> None:
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(LowRankFFN(copy.deepcopy(base), RANK).eval()(x), base(x))


def test_stage_trains_its_change_alone(base: nn.Module) -> None:
    ffn = LowRankFFN(base, RANK)
    ffn(torch.randn(5, WIDTH)).square().sum().backward()
    trained = {name for name, p in ffn.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in ffn.named_parameters() if name.startswith("deltas.")}
    assert all(p.grad is not None for p in ffn.deltas.parameters())


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_full_experts(base: nn.Module, top_k: int) -> None:
    low_rank, full = pair_of_layers(base, top_k)
    x = torch.randn(3, 7, WIDTH)
    # Worst error measured: 1.2e-6.
    torch.testing.assert_close(low_rank(x), full(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", [0, 2])
def test_forced_expert_equals_full_expert(base: nn.Module, index: int) -> None:
    low_rank, full = pair_of_layers(base)
    x = torch.randn(6, WIDTH)
    with vision_moe.force_expert(low_rank, index):
        torch.testing.assert_close(low_rank(x), full.experts[index](x), atol=1e-5, rtol=1e-5)


def test_gradients_of_router_and_input_equal_full_experts(base: nn.Module) -> None:
    low_rank, full = pair_of_layers(base)
    x = torch.randn(9, WIDTH)
    grads = []
    for layer in (low_rank, full):
        tokens = x.clone().requires_grad_()
        layer(tokens).square().sum().backward()
        grads.append((tokens.grad, layer.router.weight.grad))
    # Worst error measured: 8e-6 of gradients up to 40.
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


def test_every_change_is_in_the_graph_even_without_a_token(base: nn.Module) -> None:
    low_rank, _ = pair_of_layers(base, top_k=1)
    low_rank(torch.randn(1, WIDTH)).sum().backward()
    assert all(p.grad is not None for p in low_rank.experts.deltas.parameters())


def test_autocast_answers_in_the_precision_of_the_dense_ffn(base: nn.Module) -> None:
    low_rank, full = pair_of_layers(base)
    x = torch.randn(2, 5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank(x).dtype == full.experts[0](x).dtype


def test_a_token_passes_through_the_base_and_its_changes(base: nn.Module) -> None:
    low_rank, _ = pair_of_layers(base)
    total = sum(parameter.numel() for parameter in low_rank.parameters())
    change = sum(value.numel() for value in trained_change(base, 0).values())
    assert low_rank.num_idle_parameters() == change           # 2 of 3
    in_base = sum(parameter.numel() for parameter in base.parameters())
    assert total == in_base + 3 * change + 4 * WIDTH


def test_missing_change_is_named(base: nn.Module) -> None:
    change = trained_change(base, 1)
    name = sorted(change)[0]
    del change[name]
    with pytest.raises(InputError, match=f"low-rank expert 1: {name} is missing"):
        LowRankExperts(base, [change])


def test_change_of_another_shape_is_named(base: nn.Module) -> None:
    change = trained_change(base, 1)
    name = next(key for key in change if key.endswith(".b"))
    change[name] = change[name][1:]
    with pytest.raises(InputError, match=f"low-rank expert 1: {name} has shape"):
        LowRankExperts(base, [change])


def test_rank_below_one_is_refused(base: nn.Module) -> None:
    with pytest.raises(InputError, match="rank is 0"):
        LowRankFFN(base, 0)


def test_ffn_with_mathematics_of_its_own_is_refused() -> None:
    class Squared(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    ffn = Squared(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    with pytest.raises(InputError, match="computes something else"):
        split_ffn(ffn)


def test_folder_round_trip_is_exact(
    dense_clip: CLIPMoEModel, pixel_values: Tensor, tokens: Tensor, tmp_path: Path
) -> None:
    moe = {"num_experts": 3, "top_k": 2, "vision_layers": [1, 2], "text_layers": [0]}
    config = CLIPMoEConfig(
        open_clip_config=dense_clip.config.open_clip_config,
        moe={**moe, "vision_ranks": [2, 4], "text_ranks": [3]},
    )
    clip = CLIPMoEModel(config).eval()
    for layer in vision_moe.moe_layers(clip).values():
        for parameter in layer.experts.deltas.parameters():
            nn.init.normal_(parameter, std=0.1)
    assert [layer.experts.rank for layer in vision_moe.moe_layers(clip).values()] == [2, 4, 3]
    vision_moe.save(clip, tmp_path / "clip")
    loaded = vision_moe.load(tmp_path / "clip")
    assert torch.equal(loaded.encode_image(pixel_values), clip.encode_image(pixel_values))
    assert torch.equal(loaded.encode_text(tokens), clip.encode_text(tokens))
    tower = vision_moe.CLIPMoEVisionModel.from_pretrained(tmp_path / "clip")
    expected = clip.to_vision_model()(pixel_values).pooler_output
    assert torch.equal(tower(pixel_values).pooler_output, expected)
