"""The loss in chunks is the loss of all logits at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train.chunked_loss
from train.chunked_loss import summed_loss


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-6), (True, 0.01)])
def test_chunks_equal_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, bf16: bool, tolerance: float
) -> None:
    monkeypatch.setattr(train.chunked_loss, "_CHUNK", 3)
    torch.manual_seed(0)
    head = nn.Linear(16, 40, bias=False).requires_grad_(not frozen)
    hidden, labels = torch.randn(7, 16, requires_grad=True), torch.randint(40, (7,))
    expected = F.cross_entropy(head(hidden), labels, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = summed_loss(head, hidden, labels)
    of_hidden = torch.autograd.grad(3 * loss, hidden)[0]
    expected_grad = torch.autograd.grad(3 * expected, hidden)[0]
    assert (loss - expected).abs() < tolerance * expected.abs()
    assert (of_hidden - expected_grad).norm() < tolerance * expected_grad.norm()


def test_frozen_head_without_labels_has_no_loss() -> None:
    head = nn.Linear(16, 40, bias=False).requires_grad_(False)
    hidden = torch.randn(0, 16, requires_grad=True)
    loss = summed_loss(head, hidden, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None
