"""``key=value`` words as a benchmark's options."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from vision_moe import InputError

Options = TypeVar("Options")


def parse_options(schema: type[Options], overrides: Sequence[str]) -> Options:
    """An instance of the dataclass ``schema``: its defaults, with what the user set.

    Raises:
        InputError: A word that is not ``key=value``, an unknown key, or a value of another type.
    """
    known = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"option '{override}' is not of the form key=value")
        if key not in known:
            nearest = max(known, key=lambda one: difflib.SequenceMatcher(None, key, one).ratio())
            raise InputError(f"unknown option '{key}'; the nearest known one is '{nearest}'")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"option '{override}': not YAML") from error
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"option '{where}' is {first['input']!r}: {first['msg']}") from error
