"""The command line. Nothing heavy is imported before a command needs it.

A fault in what the user brought ends with one sentence on stderr and status 2; ``--debug`` shows
the traceback instead. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

if TYPE_CHECKING:
    from mllm.bench import BenchReport

_FAULT, _INTERRUPTED = 2, 130

# Name -> module with ``run(overrides) -> mllm.bench.BenchReport``.
BENCHMARKS: dict[str, str] = {
    "demo": "demo.bench",
    "eval": "mllm.bench.evaluation",
    "evidence": "train.evidence.command",
    "tower": "train.bench_tower",
    "train": "train.bench",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mllm-moe", prog_name="mllm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Upcycle a CLIP into a CLIP-MoE, and build, train and question MLLMs that see with it."""
    # Before the libraries are imported: their advice is not about the user's input.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@cli.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("quickstart"),
    show_default=True,
    help="Folder of the checkpoints and the report.",
)
@click.option("--seed", type=int, default=0, show_default=True)  # fmt: skip
def quickstart(out: Path, seed: int) -> None:
    """The whole pipeline on embedded models and data: base CLIP to measured MLLM."""
    from train.quickstart import run_quickstart

    run_quickstart(out, seed)


@cli.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Show what would become experts, and train nothing.")
def upcycle(recipe: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Turn a CLIP into a CLIP-MoE by diversified multiplet upcycling (DMU).

    RECIPE is the name of a shipped recipe, or a YAML file.
    """
    if dry_run:
        from train.dry_run import describe_upcycling

        click.echo(describe_upcycling(_load_recipe(recipe, overrides, upcycles=True)))
        return
    _run_recipe(recipe, overrides, upcycles=True)


@cli.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--show-batch", type=click.IntRange(1), metavar="N",
              help="Print N samples, what is learnt in color, and train nothing.")  # fmt: skip
@click.option("--dry-run", is_flag=True,
              help="Print the plan, from a model without weights, and train nothing.")  # fmt: skip
def train(
    recipe: str, overrides: tuple[str, ...], show_batch: int | None, dry_run: bool
) -> None:
    """Run a training recipe: pretraining, instruction tuning, contrastive training.

    RECIPE is the name of a shipped recipe, or a YAML file.
    """
    if dry_run:
        from train.config import load_recipe
        from train.dry_run_instruction import dry_run as plan_of

        for line in plan_of(load_recipe(recipe, overrides)):
            click.echo(line)
        return
    if show_batch is not None:
        from train.config import load_recipe
        from train.show_batch import show_batch as lines_of

        for line in lines_of(load_recipe(recipe, overrides), show_batch):
            click.echo(line)
        return
    _run_recipe(recipe, overrides, upcycles=False)


def _run_recipe(name: str, overrides: tuple[str, ...], upcycles: bool) -> None:
    from mllm.allocator import keep_freed_memory
    from train import run_recipe

    keep_freed_memory()
    folder = run_recipe(_load_recipe(name, overrides, upcycles))
    if os.environ.get("RANK", "0") == "0":  # of several processes, one says where it is
        click.echo(folder)


def _load_recipe(name: str, overrides: tuple[str, ...], upcycles: bool) -> Any:
    from train.config import load_recipe
    from train.recipe import UpcycleRecipe
    from vision_moe import InputError

    recipe = load_recipe(name, overrides)
    if isinstance(recipe, UpcycleRecipe) != upcycles:
        right = "train" if upcycles else "upcycle"
        raise InputError(f"recipe '{name}' is one for 'mllm {right}'")
    return recipe


@cli.command("check-data")
@click.argument("file")
@click.option("--image-folder", help="Where picture paths start.  [default: FILE's folder]")
@click.option("--decode", is_flag=True, help="Decode every picture, not its header alone.")
@click.option("--allow-outside", is_flag=True, help="Pictures may lie outside of that folder.")
def check_data(file: str, image_folder: str | None, decode: bool, allow_outside: bool) -> None:
    """Name the record and the fault of everything wrong in FILE.

    FILE is LLaVA's JSON, JSONL, Parquet or a WebDataset shard (.tar); 'shard-{000..012}.tar' and
    'shard-*.tar' are several.
    """
    from train.sources.check import DataCheck, check_data
    from vision_moe import InputError

    found = DataCheck()
    for fault in check_data(file, image_folder, decode, allow_outside, found=found):
        click.echo(fault)
    click.echo(found.summary(), err=True)
    if found.num_faulty:
        share = f"{found.num_faulty:,} of {found.num_records:,}"
        raise InputError(f"{file}: {share} records are faulty")


@cli.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def estimate(recipe: str, overrides: tuple[str, ...]) -> None:
    """Tell the memory and time that RECIPE will need, before it runs."""
    from train.config import load_recipe
    from train.estimate import estimate as estimate_of

    click.echo(estimate_of(load_recipe(recipe, overrides)).table())


@cli.command()
@click.argument("checkpoint")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def export(checkpoint: str, out: Path) -> None:
    """Write CHECKPOINT, adapters merged, as a folder that stock Hugging Face classes load.

    CHECKPOINT is one of a training run (RUN.checkpoints, or a checkpoint in it), or an MLLM folder.
    """
    from train.export import export as write

    click.echo(write(checkpoint, out))


@cli.group()
def convert() -> None:
    """Turn a checkpoint into a CLIP-MoE folder."""


@convert.command("clip-moe")
@click.argument("source", metavar="SRC.pt", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--top-k", type=int, default=2, show_default=True,
              help="Experts for each token; the file does not say.")  # fmt: skip
def convert_clip_moe(source: Path, out: Path, top_k: int) -> None:
    """A published CLIP-MoE checkpoint, whose one file is a dictionary of tensors."""
    import vision_moe

    model = vision_moe.convert_clip_moe(source, out, top_k)
    click.echo(f"{model.num_parameters():,} parameters written to {out}")


@convert.command("low-rank")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--energy", type=float, default=0.9, show_default=True,
              help="Share of the squared singular values that is kept.")  # fmt: skip
@click.option("--rank", type=int, help="One rank for all blocks instead.")
@click.option("--center", type=click.Choice(["expert_0", "mean"]), default="expert_0",
              show_default=True, help="What the experts become changes of; the mean then takes"
              " expert 0's place.")  # fmt: skip
def convert_low_rank(
    folder: Path, out: Path, energy: float, rank: int | None, center: Literal["expert_0", "mean"]
) -> None:
    """A CLIP-MoE FOLDER of full experts to one of low-rank experts; prints what is lost."""
    import vision_moe

    errors = vision_moe.convert_low_rank(folder, out, energy, rank, center)
    click.echo(vision_moe.error_table(errors))
    click.echo(f"written to {out}", err=True)


@cli.command("eval")
@click.argument("checkpoints", nargs=-1, metavar="[CHECKPOINT]...")
@click.option("--task", help="Name of the task, such as easy_vqa or scenes;"
              " of CLIPs: retrieval or zero_shot.")  # fmt: skip
@click.option("--data", help="Data of the task, where it has none of its own.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of scores.json and"
              " predictions.jsonl.  [default: eval/CHECKPOINT-TASK]")  # fmt: skip
@click.option("--num-questions", type=int, help="How many are drawn.  [default: the task's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--blank-images", is_flag=True, help="Show grey instead of each picture.")
@click.option("--answer-by", type=click.Choice(["generation", "likelihood"]),
              default="generation", show_default=True,
              help="Likelihood: of a multiple choice, the likeliest option.")  # fmt: skip
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--processes", type=int, default=1, show_default=True, help="That share the work.")
@click.option("--bf16", is_flag=True, help="Autocast to bfloat16.")
@click.option("--images", help="retrieval: where the pictures' paths start.")
@click.option("--split", help="retrieval: 'all', or one of the file's.  [default: test]")
@click.option("--templates", type=click.Choice(["openai", "simple"]), default="openai",
              show_default=True, help="zero_shot.")  # fmt: skip
@click.option("--class-names", help="zero_shot: JSON {folder name: class name}.")
@click.option("--submission", is_flag=True, help="Write the test server's file, too.")
@click.option("--answers", type=click.Path(path_type=Path), help="Score the answers of this JSONL"
              " file (question_id, text) instead of a checkpoint's.")  # fmt: skip
@click.option("--rescore", type=click.Path(path_type=Path), help="Score the predictions in this"
              " folder again, without model and data.")  # fmt: skip
def evaluate(
    checkpoints: tuple[str, ...],
    task: str | None,
    data: str | None,
    out: Path | None,
    num_questions: int | None,
    seed: int,
    blank_images: bool,
    answer_by: Literal["generation", "likelihood"],
    batch_size: int,
    processes: int,
    bf16: bool,
    submission: bool,
    answers: Path | None,
    rescore: Path | None,
    images: str | None,
    split: str | None,
    templates: str,
    class_names: str | None,
) -> None:
    """Ask CHECKPOINT the questions of a task and score its answers.

    The same command goes on where an interrupted one stopped. The tasks retrieval and zero_shot
    take CLIP folders, and several of them side by side.
    """
    if task in ("retrieval", "zero_shot"):
        from mllm.clip_evaluation import CLIPEvaluationConfig, comparison_table, evaluate_clips
        from vision_moe import InputError

        if data is None:
            raise InputError(f"the task '{task}' needs --data")
        if not checkpoints:
            raise click.UsageError("CHECKPOINT is needed")
        if out is None:
            names = "-".join(Path(one).resolve().name for one in checkpoints)
            out = Path("eval") / f"{names}-{task}"
        choice = CLIPEvaluationConfig(
            data, images, split, templates, class_names, batch_size, bf16
        )
        click.echo(comparison_table(evaluate_clips(checkpoints, task, choice, out)))
        click.echo(f"written to {out}", err=True)
        return
    given = [source for source in (*checkpoints, answers, rescore) if source is not None]
    if len(given) != 1:
        raise click.UsageError("one of CHECKPOINT, --answers and --rescore is needed")
    if rescore is None and task is None:
        raise click.UsageError("--task is needed")

    from mllm.evaluate import (
        EvaluationConfig,
        evaluate_answers,
        evaluate_checkpoint,
        scores_table,
    )
    from mllm.evaluate import rescore as score_again

    config = EvaluationConfig(
        num_questions, seed, blank_images, batch_size, bf16, answer_by, processes
    )
    if out is None:
        blank = "-blank" if blank_images else ""
        out = rescore or Path("eval") / f"{Path(given[0]).resolve().name}-{task}{blank}"
    if rescore is not None:
        evaluation = score_again(rescore, task)
        evaluation.save(out)
    elif answers is not None:
        evaluation = evaluate_answers(answers, str(task), config, data, out)
    else:
        evaluation = evaluate_checkpoint(checkpoints[0], str(task), config, data, out)
    click.echo(scores_table(evaluation.scores))
    if submission:
        from mllm.evaluate_submission import write_submission

        click.echo(f"for the test server: {write_submission(evaluation, out, data)}", err=True)
    click.echo(f"written to {out}", err=True)


@cli.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="A B...")
@click.option("--task", required=True, help="Name of the task, such as easy_vqa or scenes.")
@click.option("--data", help="Data of the task, where it has none of its own.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of compare.json, compare.png,"
              " compare.html and the evaluations.  [default: compare/TASK]")  # fmt: skip
@click.option("--num-questions", type=int, help="How many are drawn.  [default: the task's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of draw and intervals.")
@click.option("--batch-size", type=int, default=64, show_default=True)
def compare(
    checkpoints: tuple[str, ...],
    task: str,
    data: str | None,
    out: Path | None,
    num_questions: int | None,
    seed: int,
    batch_size: int,
) -> None:
    """Compare checkpoints B... with A on the same questions.

    Each is a checkpoint, which is asked them, or the folder of an evaluation that was.
    """
    from mllm.compare import compare_checkpoints, comparison_table
    from mllm.evaluate import EvaluationConfig
    from mllm.tasks import get_scorer

    out = out or Path("compare") / task
    config = EvaluationConfig(num_questions, seed, batch_size=batch_size)
    comparisons = compare_checkpoints(checkpoints, task, config, data, out)
    click.echo(comparison_table(get_scorer(task), comparisons))
    click.echo(f"pictures on which they differ: {out / 'compare.html'}", err=True)


@cli.command()
@click.argument("checkpoint")
@click.option("--image", required=True, type=click.Path(path_type=Path), help="Any image file.")
@click.option("--question", help="Answer this alone; without it, talk in the terminal.")
def chat(checkpoint: str, image: Path, question: str | None) -> None:
    """Ask CHECKPOINT about a picture."""
    from mllm.chat import run_chat
    from mllm.model import load_mllm
    from vision_moe import open_image

    picture = open_image(image)  # first: a damaged picture is told before the model is loaded
    run_chat(*load_mllm(checkpoint), picture, question)


@cli.command()
@click.argument("checkpoint")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path),
              help="Pictures to route (repeatable).  [default: rendered scenes]")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="Picture to write.  [default: CHECKPOINT-inspect.png, here]")  # fmt: skip
@click.option("--data", help="Diagnose the experts on a file of captions, or on 'scenes'.")
@click.option("--image-folder", help="--data: where the pictures' paths start.")
@click.option("--split", help="--data: 'all', or one of the file's.  [default: test]")
@click.option("--control", help="--data: a CLIP-MoE whose experts differ in their seeds alone.")
def inspect(
    checkpoint: str,
    images: tuple[Path, ...],
    out: Path | None,
    data: str | None,
    image_folder: str | None,
    split: str | None,
    control: str | None,
) -> None:
    """Show CHECKPOINT's parameters, in all and active, its experts and their load.

    With --data also whether its experts are diverse, whether they complement one another, and what
    the routers make of it.
    """
    from mllm.inspection import draw, inspect_checkpoint

    inspection = inspect_checkpoint(checkpoint, images)
    out = out or Path(f"{Path(checkpoint).resolve().name}-inspect.png")
    click.echo(inspection.table())
    draw(inspection, out)
    click.echo(f"picture written to {out}", err=True)
    if data is not None:
        from mllm.diagnosis import diagnose_checkpoint

        table, files = diagnose_checkpoint(checkpoint, data, out, image_folder, split, control)
        click.echo(f"\n{table}")
        click.echo(f"diagnosis written to {', '.join(map(str, files))}", err=True)


@cli.command()
@click.argument("checkpoint")
@click.option("--compare", metavar="OTHER", help="A second checkpoint that answers beside it.")
@click.option("--base", help="Model that adapters stand on.  [default: what they name]")
@click.option("--clip", type=click.Path(path_type=Path), metavar="FOLDER",
              help="CLIP-MoE of the Zero-shot tab.  [default: clip_moe beside CHECKPOINT]")
@click.option("--dense-clip", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Its dense counterpart.  [default: clip beside CHECKPOINT]")
@click.option("--load-in", type=click.Choice(["4bit", "8bit"]),
              help="Quantise the language model (bitsandbytes).")
@click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]),
              help="[default: cuda where there is one, else cpu]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535),
              help="[default: the first free one from 7860]")
@click.option("--share", is_flag=True, help="Open a public address through Gradio's servers.")
@click.option("--auth-file", type=click.Path(path_type=Path), metavar="FILE",
              help="Lines of user:password; nobody else gets in.")
@click.option("--queue-size", type=click.IntRange(1), default=64, show_default=True,
              help="Requests that may wait.")
@click.option("--max-image-pixels", type=click.IntRange(1, 89_000_000), default=50_000_000,
              show_default=True, help="Largest picture.")
@click.option("--max-upload-megabytes", type=click.IntRange(1), default=50, show_default=True,
              help="Largest file.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True,
              help="Longest answer.")  # fmt: skip
def demo(**options: Any) -> None:
    """Talk with CHECKPOINT in a browser, and see what its experts look at.

    CHECKPOINT is an MLLM folder, a LLaVA model in the Hugging Face format, or adapters on one.
    """
    from demo import DemoOptions, run_demo

    run_demo(DemoOptions(**options))


@cli.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "json_file", type=click.Path(path_type=Path),
              help="Write ratios, raw repeats, versions and hardware here.")  # fmt: skip
def bench(name: str, overrides: tuple[str, ...], json_file: Path | None) -> None:
    """Run the side-by-side benchmark NAME and print its table.

    NAME is one of demo, eval, evidence, tower and train.
    """
    from vision_moe import InputError

    if name not in BENCHMARKS:
        raise InputError(f"there is no benchmark '{name}', only {', '.join(sorted(BENCHMARKS))}")
    report: BenchReport = import_module(BENCHMARKS[name]).run(overrides)
    click.echo(report.table())
    if json_file is not None:
        report.save(json_file)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(arguments, prog_name="mllm", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("\nmllm: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout has gone (`mllm eval ... | head`); nothing more can be told it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        fault = describe_fault(error)
        if fault is None or "--debug" in arguments:
            raise
        print(f"mllm: {fault}", file=sys.stderr)
        sys.exit(_FAULT)
    sys.exit(0)


def describe_fault(error: BaseException) -> str | None:
    """One sentence on a fault in the input or the machine; ``None`` for a defect of ours."""
    # A module that raises it has imported it; importing it here would load torch for nothing.
    input_error = getattr(sys.modules.get("vision_moe"), "InputError", None)
    if input_error is not None and isinstance(error, input_error):
        return " ".join(str(error).split())
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return f"the disk is full ({text.splitlines()[0]})"
    if isinstance(error, OSError):
        reason = error.strerror or text.splitlines()[0] if text else type(error).__name__
        return f"{error.filename}: {reason}" if error.filename else reason
    return None
