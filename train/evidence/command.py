"""The benchmark ``evidence``: all cells, then what they show."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from mllm.allocator import keep_freed_memory
from mllm.bench import BenchReport, parse_options
from train import stages
from train.clip_evaluation import I2T, T2I, ZERO_SHOT
from train.evidence.cells import (
    BASE,
    STAND_IN,
    Cell,
    EvidenceOptions,
    base_folder,
    scenes_of,
    train_base,
    train_stand_in,
)
from train.evidence.claims import Claim, difference, share_of_gain
from train.evidence.experts import examine_experts
from train.evidence.methods import (
    ABLATIONS,
    ATTENTION,
    FEWER_LOSSES,
    FEWER_PAIRS,
    LANGUAGE_MODELS,
    in_order,
)
from train.evidence.plots import draw
from train.evidence.tables import tables
from train.evidence.workers import Job, finished
from train.stages import Stage, fingerprint_of
from vision_moe import InputError, atomic_write_text, writable_folder

#: Claim -> two methods, compared in retrieval.
RETRIEVAL_CLAIMS = {
    "retrieval_vs_dense": ("dmu", "dense"),
    "retrieval_vs_direct_finetuning": ("dmu", "direct"),
    "retrieval_vs_direct_finetuning_ffn": ("dmu", "direct_ffn"),
    "retrieval_vs_sparse_upcycling": ("dmu", "sparse"),
    "retrieval_vs_shuffled_labels": ("dmu", "shuffled_labels"),
    "retrieval_vs_seed_only": ("dmu", "seeds"),
    "retrieval_vs_assembly_of_the_paper": ("dmu", "as_trained"),
    "retrieval_vs_routers_of_random_batches": ("dmu", "random_batches"),
    "retrieval_vs_weight_average": ("dmu", "average"),
    "retrieval_vs_random_routing": ("dmu", "random_routing"),
    # All four experts, evenly: twice the experts of top-2, as many as top-4.
    "retrieval_vs_uniform_routing": ("dmu", "uniform"),
    "retrieval_of_top_4_vs_uniform_routing": ("top_4", "uniform"),
    "retrieval_of_clip_loss_vs_direct_finetuning": ("dmu_clip_loss", "direct_clip_loss"),
    "retrieval_of_clip_loss_vs_direct_finetuning_ffn": ("dmu_clip_loss", "direct_ffn_clip_loss"),
    "retrieval_vs_no_patch_loss": ("dmu", "patch_loss_0"),
    "retrieval_vs_no_earlier_pairs": ("dmu", "earlier_pairs_0"),
    "retrieval_of_few_pairs_vs_dense": ("dmu_few_pairs", "dense"),
    "retrieval_of_few_pairs_vs_direct_finetuning": ("dmu_few_pairs", "direct_few_pairs"),
    "retrieval_of_few_pairs_vs_direct_finetuning_ffn": ("dmu_few_pairs", "direct_ffn_few_pairs"),
    "retrieval_with_attention_vs_dense": ("dmu_attention", "dense"),
    "retrieval_with_attention_vs_direct_finetuning": ("dmu_attention", "direct"),
    "retrieval_with_attention_vs_direct_finetuning_ffn": ("dmu_attention", "direct_ffn"),
    "retrieval_with_attention_vs_direct_finetuning_with_it": (
        "dmu_attention", "direct_ffn_attention"
    ),
    "retrieval_tuned_on_vs_dense": ("dmu_tuned_on", "dense"),
    "retrieval_tuned_on_vs_direct_finetuning": ("dmu_tuned_on", "direct"),
    "retrieval_tuned_on_vs_direct_finetuning_ffn": ("dmu_tuned_on", "direct_ffn"),
    "retrieval_tuned_on_vs_direct_finetuning_with_attention": (
        "dmu_tuned_on", "direct_ffn_attention"
    ),
}  # fmt: skip
#: Claim -> a method that should name the main object at most a point less often than the base.
ZERO_SHOT_CLAIMS = {
    "zero_shot_vs_dense": "dmu",
    "zero_shot_with_attention_vs_dense": "dmu_attention",
    "zero_shot_tuned_on_vs_dense": "dmu_tuned_on",
}
#: Claim -> task, two methods, and by how much the first should be above the other.
VQA_CLAIMS = {
    "vqa_vs_dense": ("scenes", "dmu", "dense", 2.0),
    "vqa_vs_direct_finetuning": ("scenes", "dmu", "direct", 0.0),
    "vqa_vs_direct_finetuning_ffn": ("scenes", "dmu", "direct_ffn", 0.0),
    "easy_vqa_vs_dense": ("easy_vqa", "dmu", "dense", 0.0),
    "vqa_vs_direct_finetuning_of_clip_loss": ("scenes", "dmu", "direct_clip_loss", 0.0),
    "vqa_vs_direct_finetuning_ffn_of_clip_loss": ("scenes", "dmu", "direct_ffn_clip_loss", 0.0),
    "vqa_of_clip_loss_vs_direct_finetuning": (
        "scenes", "dmu_clip_loss", "direct_clip_loss", 0.0
    ),
    "vqa_of_clip_loss_vs_direct_finetuning_ffn": (
        "scenes", "dmu_clip_loss", "direct_ffn_clip_loss", 0.0
    ),
    "vqa_vs_no_patch_loss": ("scenes", "dmu", "patch_loss_0", 0.0),
    "vqa_vs_no_earlier_pairs": ("scenes", "dmu", "earlier_pairs_0", 0.0),
    "vqa_of_few_pairs_vs_dense": ("scenes", "dmu_few_pairs", "dense", 2.0),
    "vqa_of_few_pairs_vs_direct_finetuning": (
        "scenes", "dmu_few_pairs", "direct_few_pairs", 0.0
    ),
    "vqa_of_few_pairs_vs_direct_finetuning_ffn": (
        "scenes", "dmu_few_pairs", "direct_ffn_few_pairs", 0.0
    ),
    "vqa_with_attention_vs_dense": ("scenes", "dmu_attention", "dense", 2.0),
    "vqa_with_attention_vs_direct_finetuning": ("scenes", "dmu_attention", "direct", 0.0),
    "vqa_with_attention_vs_direct_finetuning_ffn": ("scenes", "dmu_attention", "direct_ffn", 0.0),
    "vqa_with_attention_vs_direct_finetuning_with_it": (
        "scenes", "dmu_attention", "direct_ffn_attention", 0.0
    ),
    "vqa_tuned_on_vs_dense": ("scenes", "dmu_tuned_on", "dense", 2.0),
    "vqa_tuned_on_vs_direct_finetuning": ("scenes", "dmu_tuned_on", "direct", 0.0),
    "vqa_tuned_on_vs_direct_finetuning_ffn": ("scenes", "dmu_tuned_on", "direct_ffn", 0.0),
    "vqa_tuned_on_vs_direct_finetuning_with_attention": (
        "scenes", "dmu_tuned_on", "direct_ffn_attention", 0.0
    ),
}  # fmt: skip
_DIAGNOSED_SCENES = 500


@dataclass
class EvidenceReport(BenchReport):
    """Also what every cell found, what is claimed, and the experts of each seed's CLIP-MoE."""

    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As ``evidence.json`` has it."""
        return {
            **super().to_dict(),
            "claims": {name: claim.as_json() for name, claim in self.claims.items()},
            "cells": self.cells,
            "experts": self.experts,
        }

    def table(self) -> str:
        """A line for each claim."""
        width = max(map(len, self.claims), default=0)
        lines = [f"mllm bench {self.name}", f"  {'':<{width}}  difference  95 % interval"]
        for name, claim in self.claims.items():
            interval = f"{claim.low:.2f} to {claim.high:.2f}"
            verdict = "reached" if claim.reached else "MISSED"
            lines.append(
                f"  {name:<{width}}  {claim.difference:10.2f}  {interval:<18} {claim.seeds} seeds,"
                f" {verdict}"
            )
        lines += [f"  {label:<{width}}  {fact}" for label, fact in self.facts.items()]
        return "\n".join(lines)


def run(overrides: Sequence[str]) -> EvidenceReport:
    """Run the cells that are missing, and put together what all found.

    Raises:
        InputError: An option is wrong, or ``out`` holds cells with another configuration.
    """
    options = parse_options(EvidenceOptions, overrides)
    cells = planned_cells(options)
    jobs = planned_jobs(options, cells)
    keep_freed_memory()
    out = writable_folder(options.out)
    ended: list[Job] = []
    started = time.monotonic()
    for job in finished(jobs, options.workers, out):
        if job.name == BASE:
            started = time.monotonic()
        ended.append(job)
        left = _minutes_left(jobs, ended, time.monotonic() - started)
        click.echo(f"\n[{len(ended)}/{len(jobs)}] {job.name} done, {left}", err=True)
        missing = {one.seed for one in jobs if one not in ended}
        # What is known of whole seeds by now is written.
        if job.seed is not None and job.seed not in missing:
            report = summarise(options, [one for one in cells if one.seed not in missing])
            write(report, out)
    report.facts["written to"] = str(out)
    return report


def write(report: EvidenceReport, out: Path) -> None:
    """``evidence.json``, its tables, and its pictures."""
    report.save(out / "evidence.json")
    evidence = report.to_dict()
    atomic_write_text(out / "tables.md", tables(evidence))
    draw(evidence, out)


def planned_cells(options: EvidenceOptions) -> list[Cell]:
    """Seed by seed, so that whatever is done by some time is whole seeds.

    Raises:
        InputError: A method, split or task is unknown or missing.
    """
    if not options.seeds or not options.splits:
        raise InputError("option 'seeds' and option 'splits' must name at least one")
    if unknown := set(options.num_questions) - {"scenes", "easy_vqa"}:
        raise InputError(f"option 'num_questions': no task '{min(unknown)}' here")
    more = (
        *(FEWER_LOSSES if options.fewer_losses else ()),
        *(FEWER_PAIRS if options.fewer_pairs else ()),
        *(ATTENTION if options.attention else ()),
    )
    names = in_order((*options.methods, *more))
    if options.mllm_methods:
        in_order(options.mllm_methods)
        # Not asked for, as a CLIP: as an MLLM neither.
        mllm_methods = tuple(n for n in (*options.mllm_methods, *more) if n in names)
        options = dataclasses.replace(options, mllm_methods=mllm_methods)
    cells = [Cell(name, seed, options) for seed in options.seeds for name in names]
    if options.ablations:
        more = in_order((*names, *ABLATIONS))
        cells += [Cell(name, options.seeds[0], options) for name in more if name not in names]
    return cells


def planned_jobs(options: EvidenceOptions, cells: Sequence[Cell]) -> list[Job]:
    """Each after those that it needs; the cells' in the cells' order."""
    jobs = [Job(BASE, partial(train_base, options))]
    if options.mllm_methods and options.mllm_runs:
        jobs += [Job(STAND_IN, partial(train_stand_in, options))]
    for cell in cells:
        jobs += cell.jobs()
        if cell.method == "dmu":
            found = {one.method: one for one in cells if one.seed == cell.seed}
            jobs.append(_experts_job(options, found))
    return jobs


def summarise(options: EvidenceOptions, cells: Sequence[Cell]) -> EvidenceReport:
    """What the cells found, all of them done."""
    report = EvidenceReport("evidence", dataclasses.asdict(options))
    report.cells = {cell.name: cell.findings() for cell in cells}
    by_seed: dict[int, dict[str, Cell]] = {}
    for cell in cells:
        by_seed.setdefault(cell.seed, {})[cell.method] = cell
    for seed, found in by_seed.items():
        if "dmu" in found:
            report.experts[str(seed)] = _experts(options, found)
    report.claims = claims(options, by_seed)
    return report


def _experts_job(options: EvidenceOptions, found: dict[str, Cell]) -> Job:
    dmu = found["dmu"]
    read = [found[method] for method in ("seeds", "dmu") if method in found]
    return Job(
        f"experts of {dmu.name}",
        partial(_experts, options, found),
        frozenset(cell.jobs()[0].name for cell in read),
        dmu.seed,
        (_experts_folder(found) / stages.RECORD).is_file(),
    )


def _experts(options: EvidenceOptions, found: dict[str, Cell]) -> dict[str, Any]:
    dmu, control = found["dmu"], found.get("seeds")
    folders = [dmu.clip] if control is None else [dmu.clip, control.clip]
    num_scenes = min(_DIAGNOSED_SCENES, options.num_pairs)
    config = {"num_pairs": options.num_pairs, "split": options.splits[0], "scenes": num_scenes}
    fingerprints = [fingerprint_of(one) for one in folders]
    stage = Stage("experts", _experts_folder(found), config, fingerprints)
    stages.run(stage, partial(_examine, dmu, control, num_scenes))
    content: dict[str, Any] = json.loads((stage.folder / "experts.json").read_text())
    return content


def _experts_folder(found: dict[str, Cell]) -> Path:
    """Each its own: a later run may have the control, or not have it any more."""
    return found["dmu"].folder / ("experts" if "seeds" in found else "experts_alone")


def _examine(dmu: Cell, control: Cell | None, num_scenes: int, folder: Path) -> None:
    options = dmu.options
    scenes = scenes_of(base_folder(options), options.num_pairs, dmu.seed, options.splits[0])
    examined = examine_experts(
        dmu.clip, None if control is None else control.clip, dmu.stage_models(), scenes,
        dmu.recipe().num_clusters, dmu.seed, num_scenes,
    )  # fmt: skip
    (folder / "experts.json").write_text(json.dumps(examined, indent=2) + "\n")


def claims(options: EvidenceOptions, by_seed: dict[int, dict[str, Cell]]) -> dict[str, Claim]:
    """Those whose methods have run, over the seeds that have all of them."""
    split = options.splits[0]
    made: dict[str, Claim] = {}

    def scores(*methods: str) -> list[list[dict[str, np.ndarray]]]:
        """For each method and seed, its hits."""
        whole = [found for found in by_seed.values() if set(methods) <= found.keys()]
        return [[found[method].hits(split) for found in whole] for method in methods]

    def retrieval(one: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        return [(hits[I2T] + hits[T2I]) / 2 for hits in one]

    for name, methods in RETRIEVAL_CLAIMS.items():
        ours, theirs = scores(*methods)
        if ours:
            made[name] = difference(retrieval(ours), retrieval(theirs))
    for name, method in ZERO_SHOT_CLAIMS.items():
        ours, base = scores(method, "dense")
        if ours:
            named = [[hits[ZERO_SHOT] for hits in one] for one in (ours, base)]
            made[name] = difference(named[0], named[1], -1.0, above_zero=False)
    part, whole, base = scores("low_rank", "dmu", "dense")
    if part:
        made["low_rank_share_of_gain"] = share_of_gain(
            retrieval(part), retrieval(whole), retrieval(base), goal=0.95
        )
    for llm, suffix in LANGUAGE_MODELS.items():
        for name, (task, one, other, goal) in VQA_CLAIMS.items():
            asked = [
                (found[one], found[other])
                for found in by_seed.values()
                if {one, other} <= {name for name, cell in found.items() if cell.mllms(llm)}
            ]
            if asked and task in options.num_questions:
                made[name + suffix] = difference(
                    [cell.answers(task, llm) for cell, _ in asked],
                    [cell.answers(task, llm) for _, cell in asked],
                    goal,
                )
    return made


def _minutes_left(jobs: Sequence[Job], ended: Sequence[Job], seconds: float) -> str:
    """By the cells' jobs that were done in so many seconds; those of an earlier run took none."""
    to_run = [job for job in jobs if job.seed is not None and not job.was_done]
    number = sum(job in ended for job in to_run)
    if not number:
        return "time left not known yet" if to_run else "by an earlier run"
    return f"{seconds / number * (len(to_run) - number) / 60:.0f} minutes left"
