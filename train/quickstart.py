"""The whole pipeline on embedded models and data, from a CLIP's first step to a measured MLLM."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from mllm.allocator import keep_freed_memory
from mllm.evaluate import EvaluationConfig, evaluate_model
from mllm.llm import embedded_llm_folder
from mllm.model import load_mllm
from mllm.tasks import get_task
from mllm.versions import hardware, library_versions
from train import contrastive, dmu, instruction, stages
from train.clip_evaluation import evaluate_clip
from train.config import load_recipe
from train.recipe import ContrastiveRecipe, InstructionRecipe, Recipe, UpcycleRecipe
from train.report import write_report
from train.stages import Stage, StageResult
from vision_moe import atomic_write_text, load

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Args:
        num_test_questions: By task; each question is asked with its picture and with a blank one.
        num_test_pairs: Candidates of the retrieval.
        overrides: By recipe: ``key=value`` over what it says.
    """

    num_test_questions: Mapping[str, int] = field(
        default_factory=lambda: {"easy_vqa": 1000, "scenes": 500}
    )
    num_test_pairs: int = 1000
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)


FULL_SCALE = Scale()


@dataclass(frozen=True)
class Recipes:
    """One for each stage that trains."""

    clip: ContrastiveRecipe
    clip_moe: UpcycleRecipe
    pretrain: InstructionRecipe
    finetune: InstructionRecipe


def run_quickstart(out: Path, seed: int = 0, scale: Scale = FULL_SCALE) -> dict[str, Any]:
    """Train and measure everything below ``out``; stages that are whole are not run again.

    Args:
        out: Folder of the checkpoints, ``report.json`` and ``report.html``.
        seed: Of the data, the models and the draws of test questions.
        scale: How much is trained and measured.

    Returns:
        What ``report.json`` holds.

    Raises:
        InputError: ``out`` cannot be written, or holds a run with another configuration.
    """
    keep_freed_memory()
    _say(f"Quickstart in {out}: base CLIP, CLIP-MoE, language model, evaluation, report.")
    recipes = quickstart_recipes(out, seed, scale)
    if recipes.pretrain.llm == "embedded":
        embedded_llm_folder()  # first: a missing network is noticed at once

    def base_clip() -> StageResult:
        return contrastive.run_stage(recipes.clip, "base CLIP")

    def upcycle() -> StageResult:
        return dmu.run_stage(recipes.clip_moe, "router tuning")

    def pretrain() -> StageResult:
        return instruction.run_stage(recipes.pretrain, "connector pretraining")

    def finetune() -> StageResult:
        return instruction.run_stage(recipes.finetune, "instruction tuning")

    done = {
        "base_clip": _announce("1/5 base CLIP", base_clip),
        "upcycle": _announce("2/5 upcycling to a CLIP-MoE", upcycle),
        "pretrain": _announce("3/5 connector pretraining", pretrain),
        "finetune": _announce("4/5 instruction tuning", finetune),
    }
    done["eval"] = _announce("5/5 evaluation", lambda: _evaluate(out, seed, scale, done))
    report = _assemble_report(out, seed, scale, done)
    atomic_write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_report(out, report)
    click.echo(summary(report, out))
    return report


def quickstart_recipes(out: Path, seed: int, scale: Scale = FULL_SCALE) -> Recipes:
    """The shipped recipes, each with its folder below ``out`` and the folder that it starts from.

    Raises:
        InputError: An override does not fit its recipe.
    """

    def load_one(name: str, kind: type[R], **paths: Path) -> R:
        settings = {"seed": seed, **{key: os.fspath(path) for key, path in paths.items()}}
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        recipe = load_recipe(name, [*overrides, *scale.overrides.get(name, ())])
        assert isinstance(recipe, kind)
        return recipe

    clip, clip_moe, pretrain, mllm = (
        out / name for name in ("clip", "clip_moe", "pretrain", "mllm")
    )
    return Recipes(
        load_one("quickstart_clip", ContrastiveRecipe, out=clip),
        load_one("quickstart_clip_moe", UpcycleRecipe, out=clip_moe, model=clip),
        load_one("quickstart_pretrain", InstructionRecipe, out=pretrain, tower=clip_moe),
        load_one("quickstart_finetune", InstructionRecipe, out=mllm, init_from=pretrain),
    )


def _announce(title: str, run: Callable[[], StageResult]) -> StageResult:
    _say(f"\n{title}")
    result = run()
    _say("already there" if result.skipped else f"done in {result.seconds:.0f} s")
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _evaluate(out: Path, seed: int, scale: Scale, done: dict[str, StageResult]) -> StageResult:
    config = {
        "questions": dict(scale.num_test_questions),
        "pairs": scale.num_test_pairs,
        "seed": seed,
    }
    inputs = [done[name].fingerprint for name in ("base_clip", "upcycle", "finetune")]
    return stages.run(
        Stage("evaluation", out / "eval", config, inputs),
        lambda folder: _make_evaluation(out, seed, scale, folder),
    )


def _make_evaluation(out: Path, seed: int, scale: Scale, folder: Path) -> None:
    clips = {
        name: evaluate_clip(load(out / path), scale.num_test_pairs, seed)
        for name, path in (("dense", "clip"), ("clip_moe", "clip_moe"))
    }
    retrieval: dict[str, Any] = {name: clip["retrieval"] for name, clip in clips.items()}
    retrieval["factors"] = {name: clip["factors"] for name, clip in clips.items()}
    retrieval["num_pairs"] = scale.num_test_pairs
    (folder / "retrieval.json").write_text(json.dumps(retrieval, indent=2) + "\n")
    model, processor = load_mllm(out / "mllm")
    for name, num_questions in scale.num_test_questions.items():
        for blank in (False, True):
            _say(f"{name}, {num_questions} test questions{', blank pictures' * blank}")
            config = EvaluationConfig(num_questions=num_questions, seed=seed, blank_images=blank)
            evaluation = evaluate_model(model, processor, get_task(name), config, str(out / "mllm"))
            evaluation.save(folder / (f"{name}-blank" if blank else name))


def _assemble_report(
    out: Path, seed: int, scale: Scale, done: dict[str, StageResult]
) -> dict[str, Any]:
    retrieval = json.loads((out / "eval" / "retrieval.json").read_text(encoding="utf-8"))
    seconds = {name: round(result.seconds, 1) for name, result in done.items()}
    return {
        "seed": seed,
        "versions": library_versions(),
        "hardware": hardware(),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "retrieval": {
            name: {key: retrieval[name][key] for key in ("i2t_r1", "t2i_r1")}
            for name in ("dense", "clip_moe")
        },
        "vqa": {name: _vqa_scores(out / "eval", name) for name in scale.num_test_questions},
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _vqa_scores(folder: Path, name: str) -> dict[str, float]:
    shown, blank = (
        json.loads((folder / which / "scores.json").read_text(encoding="utf-8"))
        for which in (name, f"{name}-blank")
    )
    return {
        "accuracy": shown["metrics"]["accuracy"],
        "blank_image_accuracy": blank["metrics"]["accuracy"],
        "n": shown["n"],
    }


def summary(report: dict[str, Any], out: Path) -> str:
    """The closing table, and the commands to go on with."""
    dense, moe = (report["retrieval"][name] for name in ("dense", "clip_moe"))
    lines = [
        "",
        f"{'retrieval R@1, detailed captions':<40}{'dense CLIP':>12}{'CLIP-MoE':>16}",
        _row("picture -> caption", dense["i2t_r1"], moe["i2t_r1"]),
        _row("caption -> picture", dense["t2i_r1"], moe["t2i_r1"]),
        "",
        f"{'questions answered':<40}{'accuracy':>12}{'blank pictures':>16}",
    ]
    for name, score in report["vqa"].items():
        label = f"{name} ({score['n']:,} test questions)"
        lines.append(_row(label, score["accuracy"], score["blank_image_accuracy"]))
    lines += [
        "",
        f"total {report['seconds']['total'] / 60:.1f} minutes; report: {out / 'report.html'}",
        f'ask it:  mllm chat {out / "mllm"} --image PICTURE --question "what color is the shape?"',
        f"look in: mllm inspect {out / 'clip_moe'}",
    ]
    return "\n".join(lines)


def _row(label: str, first: float, second: float) -> str:
    return f"{'  ' + label:<40}{first:>12.1%}{second:>16.1%}"
