"""One cell: train, measure, plug into an MLLM, ask; each step stands in a folder and is not run
again once whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import Ge, Gt
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors

from mllm.evaluate import EvaluationConfig, evaluate_model, read_predictions
from mllm.model import load_mllm
from mllm.tasks import Task, get_task
from mllm.tasks.scenes import ScenesTask
from train import run_recipe, stages
from train.clip_evaluation import HeldOutScenes, held_out_scenes, measure_clip
from train.config import load_recipe
from train.contrastive import LOG_FILE
from train.evidence.methods import (
    ALL,
    ATTENTION,
    LANGUAGE_MODELS,
    METHODS,
    TUNED_ON,
    LanguageModel,
)
from train.evidence.readers import read_facts
from train.evidence.stand_in import make_untrained, take_language_model, write_questions
from train.evidence.workers import Job
from train.experts import EXPERT_FILE, load_attention, load_expert, load_stage
from train.recipe import ContrastiveRecipe, InstructionRecipe, Recipe, UpcycleRecipe
from train.stages import Stage, fingerprint_of
from vision_moe import CLIPMoEModel, ffn_state_dict, load, save, spread_experts

R = TypeVar("R", bound=Recipe)
Split = Literal["validation", "test", "compositional"]

#: Its pictures and its weights are no cell's.
_BASE_SEED = 1000
#: Seeds of two MLLMs with one tower.
_BETWEEN_RUNS = 100
#: Jobs that those of cells need.
BASE, STAND_IN = "base CLIP", "language model"
#: Methods whose towers a pretrained language model may see with.
SEEN_BY_PRETRAINED = {*METHODS, *ATTENTION, *TUNED_ON}
_HITS, _SCORES = "hits.safetensors", "scores.json"


@dataclass(frozen=True)
class EvidenceOptions:
    """What ``key=value`` may set.

    Attributes:
        out: Folder of the cells and of what is found.
        seeds: Of data, clusters, routers and test questions; one cell for each and method.
        methods: See :mod:`train.evidence.methods`.
        fewer_losses: Also direct fine-tuning and DMU with CLIP's loss alone, as the paper has
            them, DMU without the loss on patch tokens and without pairs of earlier batches, and
            the stand-in with their towers.
        fewer_pairs: Also direct fine-tuning and DMU from a quarter of the pairs, and the stand-in
            with their towers.
        attention: Also direct fine-tuning and DMU that train the attention beside the networks and
            heed patch tokens more, and the stand-in with their towers.
        ablations: Also every ablation, with the first seed alone.
        mllm_methods: Methods whose tower an MLLM sees with; none skips the MLLMs.
        mllm_seeds: Those of the seeds whose MLLMs run; all by default.
        mllm_runs: MLLMs of each tower with the stand-in; they differ in order and random weights,
            and a question's score is their mean.
        base: Folder of a CLIP to start from; without, the recipe ``evidence_base`` trains one.
        stand_in: Folder of a small language model that sees with each tower; without, one is
            trained (:mod:`train.evidence.stand_in`).
        num_text_scenes: Whose captions and questions the stand-in learns from.
        pretrained_llm: Another that sees with the claims' towers and those of ``attention``, tuned
            by low-rank adapters (recipe ``evidence_mllm_lora``): ``embedded`` (SmolLM2), a folder,
            or a name on the model hub. None by default: it takes far longer.
        pretrained_runs: MLLMs of each tower with that one, as ``mllm_runs``.
        splits: The first is what claims rest on. To choose by: ``[validation]``.
        num_pairs: Scenes of each split, candidates of the retrieval.
        num_questions: By task.
        workers: Processes that work on cells side by side, each with its share of the threads.
        overrides: By recipe: ``key=value`` over what it says.
    """

    out: str = "runs/evidence"
    seeds: tuple[Annotated[int, Ge(0)], ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(METHODS)
    fewer_losses: bool = False
    fewer_pairs: bool = False
    attention: bool = False
    ablations: bool = False
    mllm_methods: tuple[str, ...] = ("dense", "direct", "direct_ffn", "dmu")
    mllm_seeds: tuple[int, ...] | None = None
    mllm_runs: Annotated[int, Ge(0)] = 1
    base: str | None = None
    stand_in: str | None = None
    num_text_scenes: Annotated[int, Gt(0)] = 16_000
    pretrained_llm: str | None = None
    pretrained_runs: Annotated[int, Gt(0)] = 1
    splits: tuple[Split, ...] = ("test", "compositional")
    num_pairs: Annotated[int, Gt(1)] = 2000
    num_questions: dict[str, int] = field(
        default_factory=lambda: {"scenes": 2000, "easy_vqa": 1000}
    )
    workers: Annotated[int, Ge(1)] = 1
    overrides: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Mllm:
    """A language model that sees with a cell's tower.

    Attributes:
        suffix: Behind the names of its folder and of what it finds.
        recipe: Name of the one that trains it.
        llm: As that recipe gets it.
        seed: Of order and random weights.
    """

    suffix: str
    recipe: str
    llm: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """A method with a seed."""

    method: str
    seed: int
    options: EvidenceOptions

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.options.out) / self.name

    @property
    def clip(self) -> Path:
        """The CLIP that it made; the dense cells' is the base."""
        return base_folder(self.options) if self.method == "dense" else self.folder / "clip"

    def mllms(self, llm: LanguageModel) -> list[Mllm]:
        """What sees with its tower; the answers of several count in the mean."""
        options, seeds, suffix = self.options, self.options.mllm_seeds, LANGUAGE_MODELS[llm]
        if self.method not in options.mllm_methods:
            return []
        if seeds is not None and self.seed not in seeds:
            return []
        if llm == "stand_in":
            recipe, name = "evidence_mllm", os.fspath(stand_in_folder(options))
            runs = options.mllm_runs
        else:
            if options.pretrained_llm is None or self.method not in SEEN_BY_PRETRAINED:
                return []
            recipe, name = "evidence_mllm_lora", options.pretrained_llm
            runs = options.pretrained_runs
        suffixes = [f"{suffix}_{run}" if run else suffix for run in range(runs)]
        return [
            Mllm(one, recipe, name, self.seed + run * _BETWEEN_RUNS)
            for run, one in enumerate(suffixes)
        ]

    def jobs(self) -> list[Job]:
        """What makes its CLIP, and its MLLMs if it has any."""
        clip = f"CLIP of {self.name}"
        needs = {BASE}
        if stages_of := ALL[self.method].stages_of:
            needs.add(f"CLIP of {stages_of}-{self.seed}")
        jobs = [self._job(clip, self.make_clip, needs, self.options.splits)]
        for llm in LANGUAGE_MODELS:
            needs = {clip, STAND_IN} if llm == "stand_in" else {clip}
            for mllm in self.mllms(llm):
                first = len(jobs) == 1
                found = [task + mllm.suffix for task in self.options.num_questions]
                found += ["readers"] if first else []
                make = partial(self.make_mllm, mllm, reads_tokens=first)
                jobs.append(self._job(f"MLLM{mllm.suffix} of {self.name}", make, needs, found))
        return jobs

    def _job(
        self, name: str, do: Callable[[], None], needs: set[str], found: Sequence[str]
    ) -> Job:
        """A job that ends with what it found in folders of these names."""
        was_done = all((self.folder / one / stages.RECORD).is_file() for one in found)
        return Job(name, do, frozenset(needs), self.seed, was_done)

    def make_clip(self) -> None:
        """Train the CLIP and measure it, as far as that is not done yet."""
        self.train()
        for split in self.options.splits:
            self.measure(split)

    def make_mllm(self, mllm: Mllm, reads_tokens: bool) -> None:
        """Plug the tower into an MLLM and put questions to it, as far as that is not done yet."""
        if reads_tokens:
            self.read_tokens()
        self.tune(mllm)
        for task in self.options.num_questions:
            self.ask(task, mllm)

    def recipe(self) -> UpcycleRecipe:
        """What a method that trains runs; of ``average`` its stages'."""
        paths = {"out": self.clip, "model": base_folder(self.options), "seed": self.seed}
        return _load("evidence_clip_moe", UpcycleRecipe, self.options, paths,
                     ALL[self.method].overrides)  # fmt: skip

    def train(self) -> None:
        """Make the CLIP."""
        method = ALL[self.method]
        own = Path(f"{self.clip}.stages")
        if method.stages_of is None:
            if method.trains:
                run_recipe(self.recipe())
            return
        theirs = Cell(method.stages_of, self.seed, self.options).clip
        if not self.clip.exists():
            shutil.copytree(f"{theirs}.stages", own, dirs_exist_ok=True)
        if method.trains:
            run_recipe(self.recipe())
        else:
            stage = Stage("weight average", self.clip, {}, [fingerprint_of(theirs)])
            stages.run(stage, partial(self._average, own))
        shutil.rmtree(own, ignore_errors=True)

    def _average(self, own: Path, folder: Path) -> None:
        base = load(base_folder(self.options))
        experts = [ffn_state_dict(base)]
        stage_folders = _stage_folders(own)
        experts += [load_tensors(one / EXPERT_FILE) for one in stage_folders]
        recipe = self.recipe()
        load_attention(recipe, base, stage_folders[-1])
        average = spread_experts(experts, 0, recipe.base_share)[0]
        save(load_expert(recipe, base, average), folder)

    def stage_models(self) -> Iterator[CLIPMoEModel]:
        """The dense base, then the dense CLIP of each of this cell's stages."""
        base = base_folder(self.options)
        yield load(base)
        for folder in _stage_folders(Path(f"{self.clip}.stages")):
            yield load_stage(self.recipe(), load(base), folder)

    def measure(self, split: Split) -> None:
        """What the CLIP knows."""
        config = {"num_pairs": self.options.num_pairs, "seed": self.seed, "split": split}
        stage = Stage("CLIP evaluation", self.folder / split, config, [fingerprint_of(self.clip)])
        stages.run(stage, partial(self._measure, split))

    def _measure(self, split: Split, folder: Path) -> None:
        base = base_folder(self.options)  # all have its tokenizer and preprocessing
        scenes = scenes_of(base, self.options.num_pairs, self.seed, split)
        hits = measure_clip(load(self.clip), scenes).hits
        save_file({name: hit.astype(np.uint8) for name, hit in hits.items()}, folder / _HITS)
        _write(folder / _SCORES, {name: float(hit.mean()) for name, hit in hits.items()})

    def read_tokens(self) -> None:
        """What an MLLM could find in the tower's tokens."""
        config = {"num_pairs": self.options.num_pairs, "seed": self.seed,
                  "split": self.options.splits[0]}  # fmt: skip
        stage = Stage("readers", self.folder / "readers", config, [fingerprint_of(self.clip)])
        stages.run(stage, self._read_tokens)

    def _read_tokens(self, folder: Path) -> None:
        num_scenes = self.options.num_pairs
        facts = read_facts(
            load(self.clip), self.options.splits[0], 2 * num_scenes, num_scenes, self.seed
        )
        _write(folder / _SCORES, facts)

    def tune(self, mllm: Mllm) -> None:
        """The same language model, connector, data, steps and seed for each tower."""
        paths = {
            "out": self._folder_of(mllm),
            "tower": self.clip,
            "llm": mllm.llm,
            "seed": mllm.seed,
        }
        run_recipe(_load(mllm.recipe, InstructionRecipe, self.options, paths))

    def _folder_of(self, mllm: Mllm) -> Path:
        return self.folder / f"mllm{mllm.suffix}"

    def ask(self, task: str, mllm: Mllm) -> None:
        """Put a task's test questions to an MLLM, the same to each."""
        config = {"num_questions": self.options.num_questions[task], "seed": self.seed,
                  "split": self.options.splits[0]}  # fmt: skip
        asked = self._folder_of(mllm)
        folder = self.folder / f"{task}{mllm.suffix}"
        stage = Stage("MLLM evaluation", folder, config, [fingerprint_of(asked)])
        stages.run(stage, partial(self._ask, task, asked))

    def _ask(self, task: str, mllm: Path, folder: Path) -> None:
        model, processor = load_mllm(mllm)
        config = EvaluationConfig(self.options.num_questions[task], self.seed)
        evaluate_model(
            model, processor, self._task(task), config, self.name, progress=False
        ).save(folder)

    def _task(self, name: str) -> Task:
        if name == "scenes":
            return ScenesTask(self.options.splits[0])
        return get_task(name)

    def hits(self, split: Split) -> dict[str, np.ndarray]:
        """For each kind of question ``(N,)``, 0 or 1."""
        file = self.folder / split / _HITS
        return {name: hit.astype(np.float64) for name, hit in load_file(file).items()}

    def answers(self, task: str, llm: LanguageModel) -> np.ndarray:
        """``(N,)`` scores of the answers to each question, of several MLLMs their mean."""
        runs = [
            read_predictions(self.folder / f"{task}{mllm.suffix}") for mllm in self.mllms(llm)
        ]
        return np.array([[float(one.score or 0.0) for one in run] for run in runs]).mean(0)

    def findings(self) -> dict[str, Any]:
        """Raw figures for ``evidence.json``."""
        found: dict[str, Any] = {"method": self.method, "seed": self.seed}
        for split in self.options.splits:
            found[split] = _read(self.folder / split / _SCORES)
        if self.method != "dense":
            record = _read(self.clip / stages.RECORD)
            found["seconds"] = record["seconds"]
        log = self.clip / LOG_FILE
        if self.method != "dense" and log.is_file():
            content = _read(log)
            found["seconds_of_stages"] = content["seconds_of_stages"]
            found["num_clusters"] = [one["num_clusters"] for one in content.get("stages", [])]
            found["router_change"] = content.get("router_change", {})
        for llm, suffix in LANGUAGE_MODELS.items():
            if mllms := self.mllms(llm):
                found["readers"] = _read(self.folder / "readers" / _SCORES)
                for task in self.options.num_questions:
                    found[task + suffix] = self._mean_scores(task, mllms)
        return found

    def _mean_scores(self, task: str, mllms: Sequence[Mllm]) -> dict[str, float]:
        scores = [_read(self.folder / f"{task}{one.suffix}" / _SCORES)["metrics"] for one in mllms]
        return {key: float(np.mean([one[key] for one in scores])) for key in scores[0]}


def _stage_folders(stages_of_clip: Path) -> list[Path]:
    """Of the stages that are whole, the first one first."""
    return sorted(file.parent for file in stages_of_clip.glob(f"stage_*/{EXPERT_FILE}"))


def base_folder(options: EvidenceOptions) -> Path:
    """Where the CLIP is that all start from."""
    return Path(options.base) if options.base is not None else Path(options.out) / "base"


def train_base(options: EvidenceOptions) -> None:
    """Make the CLIP that all start from, unless one is given."""
    if options.base is None:
        paths = {"out": base_folder(options), "seed": _BASE_SEED}
        run_recipe(_load("evidence_base", ContrastiveRecipe, options, paths))


def stand_in_folder(options: EvidenceOptions) -> Path:
    """Where the small language model is that sees with every tower."""
    given = options.stand_in
    return Path(given) if given is not None else Path(options.out) / "stand_in"


def train_stand_in(options: EvidenceOptions) -> None:
    """Make the stand-in, one for all cells as a pretrained one is, unless one is given.

    It learns from text alone, then to look at pictures through the tower of a CLIP that no cell
    starts from.
    """
    if options.stand_in is not None:
        return
    of_clip = {"out": Path(options.out) / "llm_clip"}
    clip = run_recipe(_load("evidence_llm_clip", ContrastiveRecipe, options, of_clip))
    with tempfile.TemporaryDirectory() as name:
        workspace = Path(name)
        of_text = {
            "out": workspace / "text",
            "llm": workspace / "untrained",
            "tower": clip,
            "data.0.path": workspace / "questions.jsonl",
            "seed": _BASE_SEED,
        }
        of_pictures = {
            "out": workspace / "pictures",
            "llm": workspace / "reader",
            "tower": clip,
            "seed": _BASE_SEED,
        }
        text = _load("evidence_llm", InstructionRecipe, options, of_text)
        pictures = _load("evidence_llm_pictures", InstructionRecipe, options, of_pictures)

        def make(folder: Path) -> None:
            make_untrained(workspace / "untrained", _BASE_SEED)
            write_questions(workspace / "questions.jsonl", options.num_text_scenes)
            run_recipe(text)
            take_language_model(workspace / "text", workspace / "reader")
            run_recipe(pictures)
            take_language_model(workspace / "pictures", folder)

        config = {
            "num_text_scenes": options.num_text_scenes,
            "text": _without(text, "out", "llm", "tower", "data"),
            "pictures": _without(pictures, "out", "llm", "tower"),
        }
        folder = stand_in_folder(options)
        stages.run(Stage("stand-in language model", folder, config, [fingerprint_of(clip)]), make)


def _without(recipe: InstructionRecipe, *keys: str) -> dict[str, Any]:
    """A recipe as plain values, but for what says where things are for the moment."""
    content = dataclasses.asdict(recipe)
    return {key: value for key, value in content.items() if key not in keys}


@lru_cache(maxsize=4)
def scenes_of(base: Path, num_pairs: int, seed: int, split: Split) -> HeldOutScenes:
    """The scenes of a split, drawn once for all cells of a seed."""
    return held_out_scenes(load(base), num_pairs, seed, split)


def _load(
    name: str,
    kind: type[R],
    options: EvidenceOptions,
    settings: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> R:
    plain = {k: os.fspath(v) if isinstance(v, Path) else v for k, v in settings.items()}
    given = [f"{key}={json.dumps(value)}" for key, value in plain.items()]
    recipe = load_recipe(name, [*options.overrides.get(name, ()), *overrides, *given])
    assert isinstance(recipe, kind)
    return recipe


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
