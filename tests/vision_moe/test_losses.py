"""The contrastive loss against its definition, in one process and in two."""

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.nn.functional import normalize

from vision_moe import contrastive_loss


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)


def by_hand(
    image: Tensor, text: Tensor, scale: float, smoothing: float, num_earlier: int = 0
) -> float:
    """The mean over rows and columns of ``-sum_k target_k log p_k``, with Python's own numbers;
    the last ``num_earlier`` pairs have no row and no column of their own."""
    size = len(image)
    cosine = [
        [
            float(a @ b) / math.sqrt(float(a @ a)) / math.sqrt(float(b @ b))
            for b in text.double()
        ]
        for a in image.double()
    ]
    num_asked = size - num_earlier
    total = 0.0
    for rows in (cosine, list(zip(*cosine, strict=True))):
        for i, row in enumerate(rows[:num_asked]):
            normaliser = math.log(sum(math.exp(scale * value) for value in row))
            for k, value in enumerate(row):
                target = smoothing / size + (1 - smoothing) * (i == k)
                total -= target * (scale * value - normaliser)
    return total / (2 * num_asked)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_loss_is_its_definition(
    features: tuple[Tensor, Tensor], scale: float, smoothing: float
) -> None:
    loss = contrastive_loss(*features, scale, label_smoothing=smoothing)
    assert float(loss) == pytest.approx(by_hand(*features, scale, smoothing), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_earlier_pairs_are_negatives(features: tuple[Tensor, Tensor], smoothing: float) -> None:
    image, text = features
    earlier = normalize(image[4:], dim=-1), normalize(text[4:], dim=-1)
    loss = contrastive_loss(
        image[:4], text[:4], 9.0, label_smoothing=smoothing, earlier=earlier
    )
    assert float(loss) == pytest.approx(by_hand(*features, 9.0, smoothing, 2), rel=1e-5)


def test_loss_is_symmetric(features: tuple[Tensor, Tensor]) -> None:
    image, text = features
    swapped = contrastive_loss(text, image, 9.0)
    torch.testing.assert_close(contrastive_loss(image, text, 9.0), swapped)


def test_norms_do_not_matter(features: tuple[Tensor, Tensor]) -> None:
    image, text = features
    scaled = contrastive_loss(image * torch.arange(1, 7)[:, None], text / 5, 9.0)
    torch.testing.assert_close(scaled, contrastive_loss(image, text, 9.0))


def test_collapsed_features_give_the_logarithm_of_the_batch() -> None:
    loss = contrastive_loss(torch.ones(6, 4), torch.ones(6, 4), 100.0)
    assert float(loss) == pytest.approx(math.log(6), rel=1e-5)


def test_perfect_features_give_none() -> None:
    assert float(contrastive_loss(torch.eye(6), torch.eye(6), 100.0)) < 1e-6


def test_gradient_reaches_a_trained_temperature(features: tuple[Tensor, Tensor]) -> None:
    scale = torch.tensor(3.0, requires_grad=True)
    contrastive_loss(*features, scale.exp()).backward()
    assert scale.grad is not None and scale.grad != 0


def test_autocast_does_not_coarsen_the_logits(features: tuple[Tensor, Tensor]) -> None:
    exact = contrastive_loss(*features, 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrastive_loss(*features, 100.0), exact, rtol=0, atol=0)


def _one_of_two(rank: int, folder: str, weight: Tensor, image: Tensor, text: Tensor) -> None:
    """Loss and gradient of one process's half of the batch."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=240),
    )
    weight = weight.clone().requires_grad_(True)
    mine = slice(3 * rank, 3 * rank + 3)
    loss = contrastive_loss(
        image[mine] @ weight,
        text[mine] @ weight,
        20.0,
        label_smoothing=0.1,
        world_size=2,
        rank=rank,
    )
    loss.backward()
    assert weight.grad is not None
    # As data-parallel training does: the mean over the processes.
    torch.distributed.all_reduce(weight.grad)
    torch.save((loss.detach(), weight.grad / 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_and_two(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    """Loss and gradient of a shared weight, in one process and in each of two."""
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(6, 8, generator=generator) for _ in range(2))
    start = torch.randn(8, 8, generator=generator)
    weight = start.clone().requires_grad_(True)
    loss = contrastive_loss(image @ weight, text @ weight, 20.0, label_smoothing=0.1)
    loss.backward()
    assert weight.grad is not None
    folder: Path = tmp_path_factory.mktemp("gloo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        # The first of the two is this process: starting another one takes seconds.
        other = torch.multiprocessing.get_context("spawn").Process(
            target=_one_of_two, args=(1, str(folder), start, image, text)
        )
        other.start()
        _one_of_two(0, str(folder), start, image, text)
        other.join()
    assert other.exitcode == 0
    each = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return (loss.detach(), weight.grad), each


def test_two_processes_have_the_loss_of_one(
    one_and_two: tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]],
) -> None:
    (loss, _), each = one_and_two
    for other, _ in each:
        torch.testing.assert_close(other, loss)


def test_two_processes_have_the_gradient_of_one(
    one_and_two: tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]],
) -> None:
    (_, gradient), each = one_and_two
    for _, other in each:
        torch.testing.assert_close(other, gradient)
