import copy

import pytest
import torch
from torch import Tensor, nn

from vision_moe import InputError, MoEFeedForward, load_balancing_loss

WIDTH = 8


def feed_forward(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))


def make_moe(top_k: int = 2, num_experts: int = 4) -> MoEFeedForward:
    experts = [feed_forward(seed) for seed in range(num_experts)]
    return MoEFeedForward(experts, WIDTH, top_k, torch.Generator().manual_seed(0))


def straightforward(moe: MoEFeedForward, x: Tensor) -> Tensor:
    """The definition, token by token."""
    rows = []
    for token in x.reshape(-1, WIDTH):
        probs = moe.router(token).softmax(-1)
        weights, chosen = probs.topk(moe.top_k)
        weights = weights / weights.sum()
        rows.append(
            torch.stack(
                [w * moe.experts[j](token) for w, j in zip(weights, chosen.tolist(), strict=True)]
            ).sum(0)
        )
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 7, WIDTH), (2, 3, 4, WIDTH), (0, WIDTH)])
def test_output_has_the_shape_of_the_input(shape: tuple[int, ...]) -> None:
    assert make_moe()(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_dispatch_equals_straightforward_loop(top_k: int) -> None:
    moe, x = make_moe(top_k), torch.randn(3, 11, WIDTH)
    # Worst error measured: 1.2e-7.
    torch.testing.assert_close(moe(x), straightforward(moe, x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_dispatch_gradients_equal_straightforward_loop(top_k: int) -> None:
    moe = make_moe(top_k)
    reference = copy.deepcopy(moe)
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    moe(x).square().sum().backward()
    straightforward(reference, y).square().sum().backward()
    # Worst error measured: 4.8e-7.
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(moe.parameters(), reference.parameters(), strict=True):
        expected = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad, expected, atol=1e-5, rtol=1e-5)


def test_identical_experts_match_dense_ffn() -> None:
    dense = feed_forward(0)
    moe = MoEFeedForward([copy.deepcopy(dense) for _ in range(4)], WIDTH, 2)
    x = torch.randn(4, 6, WIDTH)
    # Worst error measured: 6e-8.
    torch.testing.assert_close(moe(x), dense(x), atol=1e-6, rtol=0)


def test_router_weights_sum_to_one() -> None:
    weights, _ = make_moe().route(3 * torch.randn(100, 4))
    torch.testing.assert_close(weights.sum(-1), torch.ones(100), atol=1e-6, rtol=0)


def test_every_expert_is_in_the_graph_even_without_a_token() -> None:
    moe = make_moe(top_k=1)
    moe(torch.randn(1, WIDTH)).sum().backward()
    assert all(parameter.grad is not None for parameter in moe.experts.parameters())


def test_autocast_answers_in_the_precision_of_the_dense_ffn() -> None:
    moe, x = make_moe(), torch.randn(2, 5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe(x).dtype == moe.experts[0](x).dtype == torch.bfloat16


def test_autocast_does_not_change_the_routing() -> None:
    moe, x, seen = make_moe(), torch.randn(2, 50, WIDTH), []
    moe.router.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        moe(x)
    assert torch.equal(seen[0], seen[1])


def test_runs_in_bfloat16() -> None:
    moe = make_moe().bfloat16()
    assert moe(torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_router_is_drawn_from_the_generator() -> None:
    assert torch.equal(make_moe().router.weight, make_moe().router.weight)


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_outside_the_experts_is_refused(top_k: int) -> None:
    with pytest.raises(InputError, match=f"top_k is {top_k}"):
        make_moe(top_k)


def test_balance_loss_is_one_at_uniform_routing() -> None:
    assert load_balancing_loss([torch.zeros(2, 7, 4), torch.zeros(3, 4)]).item() == 1.0


def test_balance_loss_is_num_experts_at_collapse() -> None:
    logits = torch.tensor([100.0, 0.0, 0.0, 0.0]).expand(6, 4)
    assert load_balancing_loss([logits]).item() == pytest.approx(4.0)


def test_balance_loss_does_not_pool_blocks() -> None:
    first, second = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert load_balancing_loss([first, second]).item() == pytest.approx(2.0)


def test_balance_loss_pushes_probability_from_the_busy_expert() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    load_balancing_loss([logits]).backward()
    assert logits.grad is not None and (logits.grad[:, 0] > 0).all()


def test_balance_loss_of_a_dense_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="no router logits"):
        load_balancing_loss([])
