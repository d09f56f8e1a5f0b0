"""Recipes from YAML: a shipped name or a path, ``key=value`` overrides, validation."""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from train.recipe import RECIPE_KINDS, Recipe
from vision_moe import InputError, atomic_write_text

RECIPE_FOLDER = Path(__file__).parent / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, which may name another one as its ``base`` and say only what differs.

    Args:
        name_or_path: A shipped recipe's name, or a YAML file.
        overrides: ``key=value``; keys are dotted (``trainable.llm.lr``, ``data.0.num_images``) and
            values are YAML.

    Raises:
        InputError: No such recipe, not YAML, an unknown key (the nearest known one is named), or a
            value of the wrong type.
    """
    path = _find(name_or_path)
    content = _read_with_base(path)
    for override in overrides:
        _apply(content, override)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Validate what a recipe file holds; ``source`` names it in errors."""
    content = dict(content)
    kind = content.get("kind")
    if kind not in RECIPE_KINDS:
        known = ", ".join(RECIPE_KINDS)
        raise InputError(f"recipe {source}: 'kind' is {kind!r}, it must be one of {known}")
    schema = RECIPE_KINDS[kind]
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        errors = error.errors()
        unknown = [one for one in errors if one["type"] == "unexpected_keyword_argument"]
        raise InputError(_sentence(schema, (unknown or errors)[0], source)) from error


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML-able values, ``kind`` first."""
    values = dataclasses.asdict(recipe)
    return {"kind": values.pop("kind"), **values}


def save_resolved(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write every field, defaults included, as a recipe that gives the same again."""
    text = yaml.safe_dump(recipe_dict(recipe), sort_keys=False, allow_unicode=True)
    atomic_write_text(path, text)


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    name = os.fspath(name_or_path)
    shipped = RECIPE_FOLDER / f"{name}.yaml"
    if name in shipped_recipes():
        return shipped
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.name != name:
        raise InputError(f"recipe '{name}': no such file")
    nearest = nearest_name(name, shipped_recipes())
    raise InputError(f"there is no recipe '{name}'; the nearest shipped one is '{nearest}'")


def _read_with_base(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's content over that of its ``base``, a shipped recipe's name or a path."""
    content = _read(path)
    if "base" not in content:
        return content
    base = content.pop("base")
    if not isinstance(base, str):
        raise InputError(f"recipe {path}: 'base' is {base!r}, it must be a recipe's name or path")
    beside = path.parent / base
    base_path = beside if beside.is_file() else _find(base)
    if base_path in (path, *seen):
        raise InputError(f"recipe {path}: its 'base' {base} leads back to it")
    return _merged(_read_with_base(base_path, (path, *seen)), content)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``: dictionaries key by key, all else whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merged(old, value)
        merged[key] = value
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path}: not YAML ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"recipe {path}: holds no 'key: value' lines")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in place."""
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise InputError(f"override '{override}' is not of the form key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override '{override}': not YAML ({_one_line(error)})") from error
    *parents, last = key.split(".")
    node: Any = content
    for name in parents:
        if isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
        node = _child(node, name, override)
    if isinstance(node, list):
        _child(node, last, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise InputError(f"override '{override}': '{'.'.join(parents)}' has no keys")


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, dict):
        return node[name]
    if isinstance(node, list):
        if name.isdecimal() and int(name) < len(node):
            return node[int(name)]
        raise InputError(
            f"override '{override}': '{name}' must be a number below {len(node)}, one for each item"
        )
    raise InputError(f"override '{override}': there are no keys where it names '{name}'")


def _sentence(schema: type, error: ErrorDetails, source: str) -> str:
    """One sentence for pydantic's error: where, what, and the way out."""
    # A union's members stand in the location too; they are no keys of the user's.
    keys = [part for part in error["loc"] if not _is_union_tag(part)]
    where = ".".join(str(key) for key in keys)
    if error["type"] == "unexpected_keyword_argument":
        known = _fields_at(schema, keys[:-1])
        nearest = nearest_name(str(keys[-1]), known)
        return f"recipe {source}: unknown key '{where}'; the nearest known one is '{nearest}'"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"recipe {source}: '{where}' is missing"
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f"recipe {source}: '{where}' is {error['input']!r}: {message}"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and not part.replace("_", "").isalnum()


def _fields_at(schema: Any, keys: Iterable[int | str]) -> list[str]:
    """Field names of the dataclass that ``keys`` lead to."""
    for key in keys:
        if isinstance(key, int):
            continue
        schema = _dataclass_in(typing.get_type_hints(schema)[key])
    return [one.name for one in dataclasses.fields(schema)]


def _dataclass_in(annotation: Any) -> Any:
    """The dataclass inside ``list[X]``, ``X | None`` and the like."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, typing.Annotated, types.UnionType):
        for argument in typing.get_args(annotation):
            if (found := _dataclass_in(argument)) is not None:
                return found
    return None


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The most similar of ``known``."""
    return max(known, key=lambda one: difflib.SequenceMatcher(None, name, one).ratio())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
