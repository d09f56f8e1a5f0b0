"""Training: recipes, typed configurations, data, and the stages from a CLIP to an MLLM.

Importing the package loads no torch; :func:`run_recipe` loads what the recipe's kind needs.
"""

from importlib import import_module
from pathlib import Path

from train.recipe import ContrastiveRecipe, InstructionRecipe, Recipe, UpcycleRecipe

# Recipe class -> module with ``run(recipe) -> Path``
_RUNNERS: dict[type[Recipe], str] = {
    ContrastiveRecipe: "train.contrastive",
    UpcycleRecipe: "train.dmu",
    InstructionRecipe: "train.instruction",
}


def run_recipe(recipe: Recipe) -> Path:
    """Train what the recipe says and return the folder that it wrote."""
    folder: Path = import_module(_RUNNERS[type(recipe)]).run(recipe)
    return folder
