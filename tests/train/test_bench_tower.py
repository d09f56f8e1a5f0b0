import dataclasses

from mllm.bench import BenchReport
from train.bench_tower import measure_stage, quickstart_stage, run


def test_stage_is_measured_in_its_parts() -> None:
    report = BenchReport("tower")
    recipe = quickstart_stage()
    stage = dataclasses.replace(recipe.stage, steps=2, batch_size=16)
    measure_stage(report, dataclasses.replace(recipe, stage=stage), repeats=1)
    for name in ("first DMU stage", "DMU stage after the first"):
        parts = {part: report.repeats[f"{name}, of it {part}"][0]
                 for part in ("features", "clustering", "training")}  # fmt: skip
        assert 0 < sum(parts.values()) <= report.repeats[name][0]
        assert parts["features"] < parts["training"]       # no pass over all pairs
        assert report.ratios[f"{name} / plain fine-tuning"].goal == 1.05
    first, later, chain = (
        report.repeats[name][0]
        for name in ("first DMU stage", "DMU stage after the first", "chain of three DMU stages")
    )
    assert chain == first + 2 * later


def test_options_leave_parts_out() -> None:
    report = run(["towers=[]", "loading=null", "stage=false"])
    assert not report.repeats and report.config["stage"] is False
