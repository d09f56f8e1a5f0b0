"""``mllm bench evidence`` on a tiny scale: its cells, its claims, and what a second run makes."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mllm.bench import parse_options
from mllm.evaluate import read_predictions
from mllm.llm import load_llm
from train.clip_evaluation import I2T, T2I, ZERO_SHOT
from train.dmu import total_steps
from train.evidence import cells
from train.evidence.cells import (
    STAND_IN,
    Cell,
    EvidenceOptions,
    stand_in_folder,
    train_stand_in,
)
from train.evidence.command import _minutes_left, planned_cells, planned_jobs, run
from train.evidence.methods import (
    ATTENTION,
    FEWER_LOSSES,
    FEWER_PAIRS,
    LANGUAGE_MODELS,
    METHODS,
    TUNED_ON,
    LanguageModel,
    in_order,
)
from train.evidence.stand_in import make_untrained, take_language_model
from train.evidence.tables import tables
from train.evidence.workers import Job
from vision_moe import InputError, ffn_state_dict, load

CLAIMS = {
    "retrieval_vs_dense", "retrieval_vs_direct_finetuning", "retrieval_vs_sparse_upcycling",
    "retrieval_vs_shuffled_labels", "retrieval_vs_seed_only", "retrieval_vs_random_routing",
    "retrieval_vs_assembly_of_the_paper",
    "retrieval_vs_uniform_routing", "retrieval_of_top_4_vs_uniform_routing",
    "vqa_vs_dense", "vqa_vs_direct_finetuning", "zero_shot_vs_dense", "low_rank_share_of_gain",
}  # fmt: skip
TINY = {
    "evidence_clip_moe": [
        "data.num_pairs=24", "num_experts=4", "num_clusters=2", "rank=2",
        "stage={steps: 2, batch_size: 8, lr: 1.0e-2}",
        "router={steps: 2, batch_size: 8, lr: 1.0e-2}",
    ],
    "evidence_mllm": [
        "data.0.num_images=4", "data.1.num_images=4", "batch_rows=8", "epochs=1",
    ],
}  # fmt: skip
TINY["evidence_mllm_lora"] = ["data.0.num_images=4", "batch_rows=8", "epochs=1"]


@pytest.fixture(scope="module")
def options(base: Path, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    values = {
        "out": str(tmp_path_factory.mktemp("evidence") / "out"),
        "base": str(base),
        "stand_in": str(llm_folder),
        "seeds": [0, 1],
        "mllm_methods": ["dense", "direct", "dmu"],
        "num_pairs": 24,
        "num_questions": {"scenes": 4, "easy_vqa": 2},
        "overrides": TINY,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


@pytest.fixture(scope="module")
def finished(options: list[str]) -> Path:
    run(options)
    return Path(json.loads(options[0].removeprefix("out=")))


def evidence(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "evidence.json").read_text())
    return content


def test_every_claim_has_its_interval_and_seeds(finished: Path) -> None:
    found = evidence(finished)["claims"]
    assert found.keys() >= CLAIMS
    for claim in found.values():
        assert claim["seeds"] == 2
    for name in CLAIMS - {"low_rank_share_of_gain"}:  # nothing may be gained: no share of it
        assert found[name]["low"] <= found[name]["difference"] <= found[name]["high"]


def test_every_cell_has_its_figures(finished: Path) -> None:
    cells = evidence(finished)["cells"]
    assert cells.keys() == {f"{name}-{seed}" for name in METHODS for seed in (0, 1)}
    for cell in cells.values():
        assert cell["test"].keys() >= {I2T, T2I, "color", "zero_shot"}
        assert cell["compositional"].keys() >= {I2T, T2I}
    assert cells["dmu-1"]["scenes"].keys() >= {"accuracy"}
    assert "scenes" not in cells["sparse-0"] and "readers" not in cells["sparse-0"]
    readers = cells["dmu-1"]["readers"]
    assert readers and all(0 <= one <= 1 for fact in readers.values() for one in fact.values())


def test_experts_are_diagnosed_for_each_seed(finished: Path) -> None:
    experts = evidence(finished)["experts"]
    assert experts.keys() == {"0", "1"}
    assert experts["0"]["control_oracle"] is not None
    assert [one["stage"] for one in experts["0"]["suppression"]] == [1, 2, 3]


def test_dmu_and_its_uniform_mixture_share_their_experts(finished: Path) -> None:
    dmu, uniform = (load(finished / f"{name}-0" / "clip") for name in ("dmu", "uniform"))
    theirs = uniform.state_dict()
    experts = {name: one for name, one in dmu.state_dict().items() if ".experts." in name}
    assert experts and all(torch.equal(theirs[name], one) for name, one in experts.items())


def test_weight_average_lies_between_the_stages(finished: Path, base: Path) -> None:
    average = ffn_state_dict(load(finished / "average-0" / "clip"))
    moe = load(finished / "dmu-0" / "clip")
    name = "visual.transformer.resblocks.0.mlp"
    layer = moe.get_submodule(name)
    weights = [dict(expert.named_parameters()) for expert in layer.experts]  # type: ignore[union-attr, arg-type]
    for key in weights[0]:
        mean = torch.stack([one[key] for one in weights]).mean(0)
        torch.testing.assert_close(average[f"{name}.{key}"], mean)


def test_lost_cell_alone_is_made_again(finished: Path, options: list[str]) -> None:
    def written() -> dict[Path, int]:
        files = [path for path in finished.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.parent != finished}

    before, claims = written(), evidence(finished)["claims"]
    shutil.rmtree(finished / "shuffled_labels-1")
    run(options)
    after = written()
    assert after.keys() == before.keys()
    remade = {path for path in after if after[path] != before[path]}
    assert {path.relative_to(finished).parts[0] for path in remade} == {"shuffled_labels-1"}
    assert evidence(finished)["claims"] == claims


def test_fewer_methods_and_mllms_in_a_folder_of_more_are_summed_up(
    finished: Path, options: list[str], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    few = ["methods=[dmu]", "mllm_methods=[dense]", "mllm_seeds=[1]"]
    run([*options, f"out={tmp_path / 'out'}", *few])
    one, both = evidence(tmp_path / "out"), evidence(finished)
    assert one["cells"].keys() == {"dense-0", "dense-1", "dmu-0", "dmu-1"}
    assert [name for name, cell in one["cells"].items() if "scenes" in cell] == ["dense-1"]
    assert one["experts"]["0"]["control_oracle"] is None
    assert one["experts"]["0"]["suppression"] == both["experts"]["0"]["suppression"]


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
def test_a_second_mllm_of_a_tower_is_asked_the_same_and_counts_as_much(
    llm: LanguageModel, finished: Path, options: list[str], llm_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    two = {
        "stand_in": ["mllm_runs=2"],
        "pretrained": [f"pretrained_llm={llm_folder}", "pretrained_runs=2"],
    }
    changed = [
        *options, f"out={tmp_path / 'out'}", "seeds=[1]", "methods=[dmu]", "mllm_methods=[dmu]",
        *two[llm],
    ]  # fmt: skip
    run(changed)
    cell = Cell("dmu", 1, parse_options(EvidenceOptions, changed))
    suffix = LANGUAGE_MODELS[llm]
    tasks = f"scenes{suffix}", f"scenes{suffix}_1"
    first, second = (read_predictions(cell.folder / name) for name in tasks)
    assert [one.question_id for one in first] == [one.question_id for one in second]
    names = f"mllm{suffix}", f"mllm{suffix}_1"
    weights = [load_file(cell.folder / f"{name}/model.safetensors") for name in names]
    assert any(not torch.equal(one, weights[1][name]) for name, one in weights[0].items())
    for name, score in zip(tasks, (0.0, 1.0), strict=True):
        file = cell.folder / name / "scores.json"
        content = json.loads(file.read_text())
        content["metrics"]["accuracy"] = score
        file.write_text(json.dumps(content))
        lines = (cell.folder / name / "predictions.jsonl").read_text().splitlines()
        told = [json.dumps(json.loads(line) | {"score": score}) for line in lines]
        (cell.folder / name / "predictions.jsonl").write_text("\n".join(told) + "\n")
    assert cell.findings()[f"scenes{suffix}"]["accuracy"] == 0.5
    np.testing.assert_array_equal(cell.answers("scenes", llm), np.full(len(first), 0.5))


def test_pretrained_language_model_sees_with_each_tower_too(
    finished: Path, options: list[str], llm_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    run([*options, f"out={tmp_path / 'out'}", f"pretrained_llm={llm_folder}"])
    found, before = evidence(tmp_path / "out"), evidence(finished)
    claims = {name for name in before["claims"] if "vqa" in name}
    assert found["claims"].keys() - before["claims"].keys() == {f"{n}_pretrained" for n in claims}
    assert {name: found["claims"][name] for name in before["claims"]} == before["claims"]
    recipes = [
        yaml.safe_load((tmp_path / "out" / "dmu-1" / f"mllm{suffix}" / "recipe.yaml").read_text())
        for suffix in ("", "_pretrained")
    ]
    assert [one["trainable"]["llm"]["mode"] for one in recipes] == ["full", "lora"]
    scores = json.loads((tmp_path / "out" / "dmu-1" / "scenes_pretrained/scores.json").read_text())
    assert found["cells"]["dmu-1"]["scenes_pretrained"] == scores["metrics"]
    assert "scenes_pretrained" not in found["cells"]["sparse-1"]
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "### Questions answered, scenes, pretrained language model, %" in text
    assert (tmp_path / "out" / "questions_pretrained.png").is_file()


def test_variants_are_asked_beside_the_methods_they_vary(
    finished: Path, options: list[str], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    run([*options, f"out={tmp_path / 'out'}", "seeds=[1]", "methods=[direct, dmu]",
         "fewer_losses=true", "fewer_pairs=true", "attention=true"])  # fmt: skip
    found = evidence(tmp_path / "out")
    asked = {name for name, cell in found["cells"].items() if "scenes" in cell}
    more = {**FEWER_LOSSES, **FEWER_PAIRS, **ATTENTION}
    assert asked == {"dense-1", "direct-1", "dmu-1", *(f"{name}-1" for name in more)}
    assert found["claims"].keys() >= {
        "vqa_vs_direct_finetuning_of_clip_loss", "vqa_of_clip_loss_vs_direct_finetuning",
        "retrieval_of_clip_loss_vs_direct_finetuning", "retrieval_vs_no_patch_loss",
        "vqa_vs_no_patch_loss", "vqa_vs_no_earlier_pairs", "retrieval_of_few_pairs_vs_dense",
        "retrieval_of_few_pairs_vs_direct_finetuning", "vqa_of_few_pairs_vs_dense",
        "vqa_of_few_pairs_vs_direct_finetuning", "vqa_of_few_pairs_vs_direct_finetuning_ffn",
        "retrieval_with_attention_vs_direct_finetuning", "zero_shot_with_attention_vs_dense",
        "retrieval_with_attention_vs_direct_finetuning_with_it", "vqa_with_attention_vs_dense",
        "vqa_with_attention_vs_direct_finetuning_with_it",
    }  # fmt: skip
    assert all(
        method.title in (tmp_path / "out" / "tables.md").read_text()
        for method in more.values()
    )


@pytest.mark.parametrize(
    ("fewer", "name", "lacks"),
    [
        ("direct_clip_loss", "direct", {"patch_loss", "earlier_pairs"}),
        ("direct_ffn_clip_loss", "direct_ffn", {"patch_loss", "earlier_pairs"}),
        ("dmu_clip_loss", "dmu", {"patch_loss", "earlier_pairs"}),
        ("patch_loss_0", "dmu", {"patch_loss"}),
        ("earlier_pairs_0", "dmu", {"earlier_pairs"}),
    ],
)
def test_fewer_losses_lack_these_and_nothing_else(
    fewer: str, name: str, lacks: set[str], base: Path
) -> None:
    options = EvidenceOptions(base=str(base))
    whole, alone = (Cell(one, 0, options).recipe() for one in (name, fewer))
    assert whole.stage.patch_loss > 0 and whole.stage.earlier_pairs > 0
    changed: dict[str, Any] = dict.fromkeys(lacks, 0)
    for part in ("stage", "router"):
        assert getattr(alone, part) == dataclasses.replace(getattr(whole, part), **changed)
    rest = {"stage": whole.stage, "router": whole.router, "out": whole.out}
    assert dataclasses.replace(alone, **rest) == whole


def test_attention_trains_at_the_same_rates_and_losses_of_stages(base: Path) -> None:
    options = EvidenceOptions(base=str(base))
    recipes = {
        name: Cell(name, 0, options).recipe() for name in ("dmu", *ATTENTION, *TUNED_ON)
    }
    plain, dmu = recipes.pop("dmu"), recipes["dmu_attention"]
    assert (plain.attention_lr, plain.stage.patch_loss) == (None, 0.3)
    assert dmu.router.patch_loss == 1
    tuning = {name: one.router.experts_lr for name, one in recipes.items()}
    assert {name for name, rate in tuning.items() if rate is not None} == set(TUNED_ON)
    for one in recipes.values():
        assert one.attention_lr == 5e-4 and one.stage.patch_loss == 1
        assert dataclasses.replace(one.stage, steps=dmu.stage.steps) == dmu.stage


@pytest.mark.parametrize("name", ["direct", "direct_ffn", "dmu"])
def test_fewer_pairs_change_their_number_and_the_rate_alone(name: str, base: Path) -> None:
    options = EvidenceOptions(base=str(base))
    whole, fewer = (Cell(one, 0, options).recipe() for one in (name, f"{name}_few_pairs"))
    assert fewer.data == dataclasses.replace(whole.data, num_pairs=4000)
    assert whole.data.num_pairs == 16_000
    rate = fewer.stage.lr
    assert rate == whole.stage.lr if name == "dmu" else rate < whole.stage.lr
    stage = dataclasses.replace(whole.stage, lr=rate)
    assert fewer == dataclasses.replace(whole, data=fewer.data, stage=stage, out=fewer.out)


def test_pretrained_language_model_sees_with_the_towers_of_the_claims() -> None:
    options = EvidenceOptions(
        methods=("dmu", "dmu_tuned_on"), mllm_methods=("dense", "dmu", "dmu_tuned_on"),
        fewer_losses=True, attention=True, pretrained_llm="embedded",
    )  # fmt: skip
    names = {job.name for job in planned_jobs(options, planned_cells(options))}
    assert "MLLM_pretrained of dmu-1" in names and "MLLM of dmu_clip_loss-1" in names
    assert {f"MLLM_pretrained of {name}-1" for name in (*ATTENTION, *TUNED_ON)} <= names
    assert "MLLM_pretrained of dmu_clip_loss-1" not in names


def test_pretrained_language_model_alone_needs_no_stand_in() -> None:
    options = EvidenceOptions(methods=("dmu",), mllm_runs=0, pretrained_llm="embedded")
    jobs = planned_jobs(options, planned_cells(options))
    assert STAND_IN not in {job.name for job in jobs}
    assert all(STAND_IN not in job.needs for job in jobs)
    names = [job.name for job in jobs if job.seed == 1]
    assert [name for name in names if "MLLM" in name] == [
        "MLLM_pretrained of dense-1", "MLLM_pretrained of dmu-1"
    ]  # fmt: skip


def test_cells_side_by_side_find_the_same(
    finished: Path, options: list[str], tmp_path: Path
) -> None:
    few = ["seeds=[0]", "methods=[uniform, sparse]", "mllm_methods=[]", "workers=2"]
    run([*options, f"out={tmp_path / 'out'}", *few])
    found = evidence(tmp_path / "out")["cells"]
    assert found.keys() == {"dense-0", "sparse-0", "dmu-0", "uniform-0"}
    alone = evidence(finished)["cells"]
    for name, cell in found.items():
        assert cell["test"] == alone[name]["test"]
    assert list((tmp_path / "out").glob("worker-*.log"))


def test_stand_in_learns_from_text_and_pictures_once(tmp_path: Path) -> None:
    small = ["data.num_pairs=16", "training={steps: 1, batch_size: 8, lr: 1.0e-3}"]
    options = EvidenceOptions(
        out=str(tmp_path), num_text_scenes=8,
        overrides={
            "evidence_llm_clip": small,
            "evidence_llm": ["batch_rows=4"],
            "evidence_llm_pictures": TINY["evidence_mllm"],
        },
    )  # fmt: skip
    seen: list[dict[str, Any]] = []

    def watched(mllm: Path, folder: Path) -> None:
        seen.append(yaml.safe_load((mllm / "recipe.yaml").read_text()))
        take_language_model(mllm, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "take_language_model", watched)
        train_stand_in(options)
    text, pictures = seen
    assert [source["name"] for source in text["data"]] == ["jsonl"]
    assert [source["name"] for source in pictures["data"]] == ["scenes_questions", "easy_vqa"]
    assert text["tower"] == pictures["tower"] == str(tmp_path / "llm_clip")
    folder = stand_in_folder(options)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    trained, tokenizer = load_llm(os.fspath(folder))
    make_untrained(tmp_path / "untrained", 1000)
    untrained, _ = load_llm(os.fspath(tmp_path / "untrained"))
    assert tokenizer.chat_template
    words = untrained.get_input_embeddings().weight
    assert not torch.equal(trained.get_input_embeddings().weight[: len(words)], words)
    train_stand_in(options)
    assert written == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_time_left_is_told_by_the_jobs_of_this_run(
    finished: Path, options: list[str], tmp_path: Path
) -> None:
    def planned(out: Path) -> list[Job]:
        changed = parse_options(EvidenceOptions, [*options[1:], f"out={out}"])
        return planned_jobs(changed, planned_cells(changed))

    whole = planned(finished)
    assert all(job.was_done for job in whole if job.seed is not None)
    assert _minutes_left(whole, whole[:5], 600) == "by an earlier run"
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "dmu-1" / "scenes")
    shutil.rmtree(tmp_path / "out" / "sparse-0")
    jobs = planned(tmp_path / "out")
    earlier = [job for job in jobs if job.seed is None or job.was_done]
    to_run = [job for job in jobs if job not in earlier]
    assert [job.name for job in to_run] == ["CLIP of sparse-0", "MLLM of dmu-1"]
    assert _minutes_left(jobs, earlier, 600) == "time left not known yet"
    assert _minutes_left(jobs, [*earlier, to_run[0]], 600) == "10 minutes left"


def test_cells_with_another_configuration_are_refused(
    finished: Path, options: list[str]
) -> None:
    with pytest.raises(InputError, match="another configuration"):
        run([*options, "num_pairs=20"])


def test_methods_come_after_what_they_take(base: Path) -> None:
    assert in_order(("average", "direct")) == ("dense", "direct", "dmu", "average")
    with pytest.raises(InputError, match="'spars'; the nearest known one is 'sparse'"):
        in_order(("spars",))


def test_ablations_run_with_one_seed() -> None:
    cells = planned_cells(EvidenceOptions(methods=("dmu",), ablations=True))
    assert [cell.seed for cell in cells if cell.method == "experts_8"] == [0]
    assert [cell.seed for cell in cells if cell.method == "dmu"] == [0, 1, 2]


def test_each_method_trains_for_as_many_steps(base: Path, tmp_path: Path) -> None:
    options = EvidenceOptions(out=str(tmp_path), base=str(base))
    methods = (*METHODS, *FEWER_LOSSES, *FEWER_PAIRS, *ATTENTION, *TUNED_ON)
    recipes = {name: Cell(name, 0, options).recipe() for name in methods}
    assert len({total_steps(one) for one in recipes.values()}) == 1


def test_tables_and_pictures_are_written(finished: Path) -> None:
    text = (finished / "tables.md").read_text()
    assert all(method.title in text for method in METHODS.values())
    assert "| retrieval_vs_dense |" in text
    names = ("claims", "retrieval", "factors", "questions", "suppression")
    assert all((finished / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_ablations_stand_beside_dmu_of_their_seed(finished: Path) -> None:
    content = evidence(finished)
    changed = {name: dict(cell["test"]) for name, cell in content["cells"].items()}
    changed["dmu-1"] |= {I2T: 0.5, T2I: 0.5, ZERO_SHOT: 0.5}
    ours = changed["dmu-1"] | {I2T: 0.75, T2I: 0.5, ZERO_SHOT: 0.25}
    content["cells"]["dmu-1"]["test"] = changed["dmu-1"]
    dmu = content["cells"]["dmu-1"]
    content["cells"]["top_1-1"] = {"method": "top_1", "seed": 1, "test": ours} | {
        "compositional": dmu["compositional"]
    }
    whole, table = tables(content).split("### One thing of DMU changed")
    assert "top-1" not in whole
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[2:]] == ["50.0", "62.5 (+12.5)"]
    assert [row[-1].removesuffix(" |") for row in rows[2:]] == ["50.0", "25.0 (-25.0)"]
