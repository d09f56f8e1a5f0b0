"""A folder for stock Hugging Face, from a finished MLLM or from a training checkpoint."""

from pathlib import Path

from mllm.model import load_mllm, save_mllm
from train.checkpoints import checkpoints_in, fault_of, newest_whole
from train.config import load_recipe, save_resolved
from train.mllm_checkpoint import RECIPE_FILE, read_state
from train.recipe import InstructionRecipe
from train.starting_model import finished_model
from vision_moe import InputError


def export(source: str | Path, out: str | Path) -> Path:
    """Write the model of ``source`` to ``out``, adapters merged.

    Args:
        source: A checkpoint of a run (``checkpoint-200``), the folder that holds several (the
            newest whole one is taken), or an MLLM folder or hub name.
        out: Folder to write.

    Raises:
        InputError: There is no such model, or the checkpoint is damaged.
    """
    checkpoint = _training_checkpoint(Path(source))
    if checkpoint is None:
        model, processor = load_mllm(source)
        save_mllm(model, processor, out)
        return Path(out)
    recipe = load_recipe(checkpoint / RECIPE_FILE)
    if not isinstance(recipe, InstructionRecipe):
        raise InputError(f"{checkpoint}: a checkpoint of a run that trains no MLLM")
    state = read_state(checkpoint, list(recipe.trainable.adapted_parts))
    model, processor = finished_model(recipe, state, str(checkpoint))
    save_mllm(model, processor, out)
    save_resolved(recipe, Path(out) / RECIPE_FILE)
    return Path(out)


def _training_checkpoint(source: Path) -> Path | None:
    if checkpoints_in(source):
        return newest_whole(source)
    if not (source / RECIPE_FILE).is_file() or (source / "config.json").is_file():
        return None
    if (fault := fault_of(source)) is not None:
        raise InputError(f"{source}: the checkpoint is not whole: {fault}")
    return source
