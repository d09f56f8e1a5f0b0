"""The benchmark of towers: its arithmetic and its straightforward loop."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mllm.bench import BenchReport
from mllm.bench import tower as bench
from vision_moe import CLIPMoEVisionModel

DESCRIPTION = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {},
}
MOE = {"num_experts": 4, "top_k": 2, "vision_layers": [0, 1]}


@pytest.fixture
def moe_tower() -> CLIPMoEVisionModel:
    return bench.random_tower(DESCRIPTION, MOE)


def test_flops_are_those_that_pytorch_counts() -> None:
    dense = bench.random_tower(DESCRIPTION, None)
    # It does not count what a fused attention kernel does.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        dense(torch.randn(1, 3, 32, 32))
    assert counter.get_total_flops() == bench.tower_flops(dense.config, 1)


def test_k_experts_add_their_products() -> None:
    config = bench.random_tower(DESCRIPTION, None).config
    one_ffn = 17 * 2 * 2 * 64 * 256
    added = bench.tower_flops(config, 3) - bench.tower_flops(config, 1)
    assert added == 2 * 2 * one_ffn                          # two more in each of two blocks


def test_loop_over_experts_equals_the_tower(moe_tower: CLIPMoEVisionModel) -> None:
    other = bench.straightforward(moe_tower)
    images = torch.randn(2, 3, 32, 32)
    assert sum(1 for m in other.modules() if isinstance(m, bench.LoopOverExperts)) == 2
    assert {p.data_ptr() for p in other.parameters()} == {
        p.data_ptr() for p in moe_tower.parameters()
    }
    with torch.no_grad():
        expected = moe_tower(images).last_hidden_state
        # Worst error measured: 5e-7.
        torch.testing.assert_close(other(images).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_a_case_fills_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_describe", lambda name: {**DESCRIPTION, "vision_cfg": {
        **DESCRIPTION["vision_cfg"]}})  # fmt: skip
    monkeypatch.setattr(bench, "RANKS", {"tiny": 4})
    report = BenchReport("tower")
    bench.measure_case(report, bench.Case("tiny", batch_size=2, blocks=2, repeats=2))
    assert len(report.repeats["tiny, batch 2: MoE"]) == 2
    ratios = report.ratios
    assert ratios["tiny, batch 2: MoE / (dense x FLOP ratio)"].goal == 1.05
    assert ratios["tiny, batch 2: low-rank MoE (rank 4) / dense"].goal == 1.15
    assert ratios["tiny: parameters of low-rank MoE (rank 4) / dense"].value > 1


def test_loading_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 1, "layers": 1}
    monkeypatch.setattr(bench, "_describe", lambda name: {**DESCRIPTION, "text_cfg": text})
    report = BenchReport("tower")
    bench.measure_loading(report, "tiny", repeats=1)
    assert report.ratios["tiny CLIP-MoE: loading / reading"].goal == 1.2
