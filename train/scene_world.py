"""The world of rendered scenes that a recipe describes."""

from dataclasses import fields
from typing import Any

from mllm.scenes import SceneWorld
from train.config import nearest_name
from vision_moe import InputError


def scene_world(settings: dict[str, Any], key: str) -> SceneWorld:
    """``SceneWorld(**settings)``; ``key`` is where the settings stand in the recipe.

    Raises:
        InputError: There is no such setting (the nearest known one is named), or its value is none.
    """
    known = [one.name for one in fields(SceneWorld)]
    for name in settings:
        if name not in known:
            nearest = nearest_name(str(name), known)
            raise InputError(f"unknown key '{key}.{name}'; the nearest known one is '{nearest}'")
    try:
        return SceneWorld(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"'{key}': {error}") from error
