"""Every way by which tokens reach experts against the definition: each expert on each token."""

import copy
from typing import Any

import pytest
import torch
from timm.layers import Mlp, SwiGLU
from torch import Tensor, nn

from vision_moe import CLIPMoEModel, LowRankExperts, MoEFeedForward, load_balancing_loss, products
from vision_moe import dispatch as dispatch_module

WIDTH, HIDDEN = 8, 24


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()                        # it stops compiling a function after eight times


class Opaque(nn.Module):
    """A network that cannot be taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())


FFNS = {
    "plain": lambda: nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
    ),
    "no bias": lambda: Mlp(WIDTH, HIDDEN, bias=False),
    "own norm": lambda: SwiGLU(WIDTH, HIDDEN, norm_layer=nn.LayerNorm),
    "opaque": Opaque,
    "low rank": lambda: nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
    ),
}


def make_layer(name: str, top_k: int = 2) -> MoEFeedForward:
    torch.manual_seed(0)
    experts: Any = [FFNS[name]() for _ in range(4)]
    if name == "low rank":
        experts = LowRankExperts.empty(experts[0], num_experts=4, rank=3)
        for parameter in experts.deltas.parameters():
            nn.init.normal_(parameter, std=0.3)
    return MoEFeedForward(experts, WIDTH, top_k)


def definition(layer: MoEFeedForward, x: Tensor) -> Tensor:
    weights, chosen = layer.route(layer.router(x))
    outputs = [dispatch_module.run_expert(layer.experts, j, x) for j in range(layer.num_experts)]
    stacked = torch.stack(outputs, 1)                                       # (T, E, D)
    picked = stacked.gather(1, chosen.unsqueeze(2).expand(-1, -1, WIDTH))
    return (weights.unsqueeze(2) * picked).sum(1)


@pytest.fixture(params=sorted(FFNS))
def layer(request: pytest.FixtureRequest) -> MoEFeedForward:
    return make_layer(request.param)


def test_inference_by_piece_equals_definition(
    layer: MoEFeedForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "_PIECE", 4)
    x = torch.randn(31, WIDTH)
    with torch.no_grad():
        # Worst error measured: 4e-7.
        torch.testing.assert_close(layer(x), definition(layer, x), atol=5e-6, rtol=0)


def test_inference_with_onednn_equals_definition(
    layer: MoEFeedForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_WORTH_A_KERNEL", 0)
    x = torch.randn(31, WIDTH)
    with torch.no_grad():
        # Worst error measured: 4e-7.
        torch.testing.assert_close(layer(x), definition(layer, x), atol=5e-6, rtol=0)


def test_onednn_is_left_out_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_WORTH_A_KERNEL", 0)
    layer, x = nn.Linear(WIDTH, HIDDEN), torch.randn(5, WIDTH)
    with torch.no_grad(), products.pytorch_products():
        assert torch.equal(products.linear(layer, x), layer(x))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_inference_equals_training(top_k: int) -> None:
    layer, x = make_layer("plain", top_k), torch.randn(2, 9, WIDTH)
    expected = layer(x)
    with torch.no_grad():
        # Worst error measured: 2e-7.
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


def test_compiled_without_a_graph_break_equals_definition(layer: MoEFeedForward) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(13, WIDTH)
    for num_tokens in (13, 7):
        # Worst error measured: 6e-7.
        torch.testing.assert_close(
            compiled(x[:num_tokens]), definition(layer, x[:num_tokens]), atol=5e-6, rtol=0
        )


def test_compiled_gradients_equal_definition(layer: MoEFeedForward) -> None:
    reference = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(11, WIDTH)
    compiled(x).square().sum().backward()
    definition(reference, x).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
        # Worst error measured: 2e-5 of gradients up to 60.
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_groups_filled_to_a_round_number_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer("plain"), torch.randn(31, WIDTH)

    def gradients(num_filling: int) -> list[Tensor]:
        asked: list[int] = []
        monkeypatch.setattr(
            dispatch_module, "num_filling_rows", lambda number: asked.append(number) or num_filling
        )
        layer.zero_grad()
        tokens = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(tokens)
        output.float().square().sum().backward()
        assert sum(asked) == 31 * layer.top_k
        found = [parameter.grad for parameter in layer.parameters()]
        return [output.detach(), *(one for one in [tokens.grad, *found] if one is not None)]

    for bare, filled in zip(gradients(0), gradients(5), strict=True):
        # Equal when measured; products of other shapes may add up in another order.
        torch.testing.assert_close(filled, bare, atol=0.03 * float(bare.abs().max()), rtol=0)


@pytest.mark.parametrize("trace", [False, True])
def test_every_parameter_has_a_gradient_after_one_token(
    layer: MoEFeedForward, trace: bool
) -> None:
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if trace else layer
    run(torch.randn(1, WIDTH)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_compiled_autocast_answers_in_its_precision() -> None:
    layer = make_layer("plain")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
        # bf16 has 8 bits; worst error measured: 3e-3.
        torch.testing.assert_close(compiled(x), layer(x), atol=2e-2, rtol=2e-2)


def test_compiled_tower_equals_eager_tower(moe_clip: CLIPMoEModel, pixel_values: Tensor) -> None:
    tower = moe_clip.to_vision_model()
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        output = compiled(pixel_values, output_hidden_states=True)
        expected = tower(pixel_values, output_hidden_states=True)
    # Worst error measured: 7e-7.
    torch.testing.assert_close(
        output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0
    )
    assert len(output.router_logits) == 3
    torch.testing.assert_close(
        output.router_logits[-1], expected.router_logits[-1], atol=1e-5, rtol=0
    )


def test_gradient_checkpointing_gives_the_same_gradients(
    moe_clip: CLIPMoEModel, pixel_values: Tensor
) -> None:
    tower = moe_clip.to_vision_model().train()
    grads = []
    for enable in (False, True):
        tower.gradient_checkpointing = enable
        assert tower.visual.transformer.grad_checkpointing == enable
        tower.zero_grad()
        output = tower(pixel_values)
        loss = output.last_hidden_state.square().mean() + load_balancing_loss(output.router_logits)
        loss.backward()
        grads.append({k: p.grad for k, p in tower.named_parameters() if p.grad is not None})
    assert "visual.transformer.resblocks.0.mlp.router.weight" in grads[0]
    # Worst error measured: 0.
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-5)


def test_transformers_turns_gradient_checkpointing_on(moe_clip: CLIPMoEModel) -> None:
    moe_clip.gradient_checkpointing_enable()
    assert moe_clip.text.transformer.grad_checkpointing
    assert moe_clip.visual.transformer.grad_checkpointing
    moe_clip.gradient_checkpointing_disable()
    assert not moe_clip.visual.transformer.grad_checkpointing
