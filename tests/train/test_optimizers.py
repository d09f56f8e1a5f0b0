import torch
from torch import nn

from train.optimizers import CombinedOptimizer, build_optimizer, is_block_matrix
from train.recipe import ContrastiveTraining
from train.schedule import learning_rate_schedule


def _training(optimizer: str) -> ContrastiveTraining:
    return ContrastiveTraining(steps=4, lr=0.01, optimizer=optimizer)  # type: ignore[arg-type]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(8.0).reshape(2, 4) / 8).square().sum().backward()
    optimizer.step()


def test_block_matrices_are_two_dimensional_parameters_of_numbered_blocks():
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    assert is_block_matrix("visual.transformer.resblocks.3.mlp.c_fc.weight", matrix)
    assert not is_block_matrix("visual.transformer.resblocks.3.mlp.c_fc.bias", vector)
    assert not is_block_matrix("text.token_embedding.weight", matrix)


def test_adamw_alone_is_no_combination():
    optimizer = build_optimizer(_model().named_parameters(), _training("adamw"))
    assert isinstance(optimizer, torch.optim.AdamW)


def test_muon_gets_the_matrices_and_adamw_the_rest():
    model = _model()
    optimizer = build_optimizer(model.named_parameters(), _training("muon"))
    assert isinstance(optimizer, CombinedOptimizer)
    adamw, muon = optimizer.optimizers
    assert {p.ndim for group in muon.param_groups for p in group["params"]} == {2}
    assert {p.ndim for group in adamw.param_groups for p in group["params"]} == {1}


def test_frozen_parameters_are_left_out():
    model = _model()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), _training("muon"))
    chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert chosen == {id(p) for p in model.parameters() if p.requires_grad}


def test_vectors_do_not_decay():
    optimizer = build_optimizer(_model().named_parameters(), _training("adamw"))
    groups = optimizer.param_groups
    decay = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {2: 0.2, 1: 0.0}


def test_parameters_can_have_a_rate_of_their_own():
    for name in ("adamw", "muon"):
        model = _model()
        optimizer = build_optimizer(model.named_parameters(), _training(name), {"0.weight": 0.5})
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert {name: rates[id(p)] for name, p in model.named_parameters()} == {
            "0.weight": 0.5, "0.bias": 0.01, "1.weight": 0.01, "1.bias": 0.01,
            "2.weight": 0.01, "2.bias": 0.01,
        }  # fmt: skip
        assert optimizer.param_groups[0]["lr"] == 0.01  # the one that is logged


def test_a_schedule_reaches_every_member():
    optimizer = build_optimizer(_model().named_parameters(), _training("muon"))
    learning_rate_schedule(optimizer, "cosine", warmup_steps=2, steps=4)
    rates = {group["lr"] for one in optimizer.optimizers for group in one.param_groups}
    assert rates == {0.005}


def test_stepping_goes_on_bit_equal_from_a_saved_state():
    whole, resumed = _model(), _model()
    first = build_optimizer(whole.named_parameters(), _training("muon"))
    for _ in range(4):
        _step(whole, first)
    before = build_optimizer(resumed.named_parameters(), _training("muon"))
    for _ in range(2):
        _step(resumed, before)
    after = build_optimizer(resumed.named_parameters(), _training("muon"))
    after.load_state_dict(before.state_dict())
    for _ in range(2):
        _step(resumed, after)
    for expected, parameter in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, parameter)
