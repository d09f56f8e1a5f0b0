"""Full experts turned into low-rank changes of expert 0."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vision_moe
from vision_moe import CLIPMoEModel, InputError, convert_low_rank, error_table, to_low_rank


@pytest.fixture
def low_rank_clip(dense_clip: CLIPMoEModel) -> CLIPMoEModel:
    """Full experts whose changes have rank 3, but for a little noise."""
    base = vision_moe.ffn_state_dict(dense_clip)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    experts = [base]
    for _ in range(2):
        expert = {}
        for key, value in base.items():
            change = draw(len(value), 3) @ draw(3, value.shape[1]) if value.dim() == 2 else draw(
                *value.shape
            )
            expert[key] = value + change + 1e-4 * draw(*value.shape)
        experts.append(expert)
    return vision_moe.upcycle(dense_clip, experts, top_k=2)


def test_the_rank_is_found_and_features_stay(
    low_rank_clip: CLIPMoEModel, pixel_values: Tensor, tokens: Tensor, tmp_path: Path
) -> None:
    vision_moe.save(low_rank_clip, tmp_path / "full")
    errors = convert_low_rank(tmp_path / "full", tmp_path / "low", energy=0.9999)
    assert [error.rank for error in errors] == [3] * 5
    assert all(0 < error.change_error < 0.01 and error.output_error < 0.01 for error in errors)
    loaded = vision_moe.load(tmp_path / "low")
    assert loaded.config.moe["vision_ranks"] == [3, 3, 3]
    assert loaded.config.moe["text_ranks"] == [3, 3]
    assert loaded.num_parameters() < low_rank_clip.num_parameters()
    with torch.no_grad():
        # The noise that was left out: worst error measured 4e-4 of features up to 3.
        torch.testing.assert_close(
            loaded.encode_image(pixel_values), low_rank_clip.encode_image(pixel_values),
            atol=5e-3, rtol=1e-2,
        )
        torch.testing.assert_close(
            loaded.encode_text(tokens), low_rank_clip.encode_text(tokens), atol=5e-3, rtol=1e-2
        )


def test_full_rank_loses_nothing(moe_clip: CLIPMoEModel, pixel_values: Tensor) -> None:
    with torch.no_grad():
        before = moe_clip.encode_image(pixel_values)
        errors = to_low_rank(moe_clip, energy=1.0)
        after = moe_clip.encode_image(pixel_values)
    # Worst error measured: 2e-6.
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-5)
    assert max(error.change_error for error in errors) < 1e-6


def test_experts_become_changes_of_their_mean(moe_clip: CLIPMoEModel) -> None:
    name, layer = next(iter(vision_moe.moe_layers(moe_clip).items()))
    x = torch.randn(5, layer.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [expert(x) for expert in layer.experts]
        weights = torch.stack([expert.c_fc.weight for expert in layer.experts])
        to_low_rank(moe_clip, energy=1.0, center="mean")
        experts = moe_clip.get_submodule(name).experts
        for number, output in enumerate(outputs[1:], start=1):
            alone = experts.mix(x, torch.ones(5, 1), torch.full((5, 1), number))
            torch.testing.assert_close(alone, output, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(experts.base.c_fc.weight, weights.mean(0))
        assert not torch.equal(experts.base.c_fc.weight, weights[0])


def test_error_is_that_of_the_best_approximation(moe_clip: CLIPMoEModel) -> None:
    layer = next(iter(vision_moe.moe_layers(moe_clip).values()))
    lost = total = 0.0
    for expert in layer.experts[1:]:
        for name in ("c_fc", "c_proj"):
            change = expert.get_submodule(name).weight - layer.experts[0].get_submodule(name).weight
            squares = torch.linalg.svdvals(change.detach().double()).square()
            lost, total = lost + float(squares[4:].sum()), total + float(squares.sum())
    error = to_low_rank(moe_clip, rank=4)[0]
    assert error.rank == 4
    assert error.change_error == pytest.approx((lost / total) ** 0.5, rel=1e-6)


def test_more_energy_means_more_rank_and_less_error(moe_clip: CLIPMoEModel, tmp_path: Path) -> None:
    vision_moe.save(moe_clip, tmp_path)
    few, many = (to_low_rank(vision_moe.load(tmp_path), energy)[0] for energy in (0.5, 0.95))
    assert few.rank < many.rank and few.change_error > many.change_error
    assert many.change_error <= 0.05**0.5 < few.change_error


def test_table_has_a_line_for_each_block(moe_clip: CLIPMoEModel) -> None:
    lines = error_table(to_low_rank(moe_clip)).splitlines()
    assert len(lines) == 1 + 5 and "visual.transformer.resblocks.0.mlp" in lines[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.1}, "energy is 1.1"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_impossible_options(moe_clip: CLIPMoEModel, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_low_rank(moe_clip, **options)


def test_dense_model_is_refused(dense_clip: CLIPMoEModel) -> None:
    with pytest.raises(InputError, match="is dense"):
        to_low_rank(dense_clip)


def test_low_rank_model_is_refused(moe_clip: CLIPMoEModel) -> None:
    to_low_rank(moe_clip, rank=2)
    with pytest.raises(InputError, match="of low rank already"):
        to_low_rank(moe_clip)


def test_writing_over_the_source_is_refused(moe_clip: CLIPMoEModel, tmp_path: Path) -> None:
    vision_moe.save(moe_clip, tmp_path / "clip")
    with pytest.raises(InputError, match="cannot be the one that is written"):
        convert_low_rank(tmp_path / "clip", tmp_path / "clip")
