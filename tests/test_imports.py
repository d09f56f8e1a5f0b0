"""Imports between the packages point one way: demo and train -> mllm -> vision_moe."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vision_moe", "mllm", "train", "demo")
MAY_IMPORT = {
    "vision_moe": set(),
    "mllm": {"vision_moe"},
    "train": {"vision_moe", "mllm"},
    "demo": {"vision_moe", "mllm"},
}


@dataclass
class Import:
    file: Path
    line: int
    module: str
    names: list[str]
    in_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.module}"


def imports_of(package: str) -> Iterator[Import]:
    for file in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        lazy = {
            id(inner)
            for outer in ast.walk(tree)
            if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
            for inner in ast.walk(outer)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(file, node.lineno, alias.name, [], id(node) in lazy)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [alias.name for alias in node.names]
                yield Import(file, node.lineno, node.module or "", names, id(node) in lazy)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_it_may(package: str) -> None:
    ours = (one for one in imports_of(package) if one.module.split(".")[0] in PACKAGES)
    forbidden = [
        str(one)
        for one in ours
        if (imported := one.module.split(".")[0]) != package
        and imported not in MAY_IMPORT[package]
        and not (one.file == ROOT / "mllm" / "cli.py" and one.in_function)
    ]
    assert not forbidden


def test_mllm_uses_public_names_of_vision_moe() -> None:
    import vision_moe

    private = [
        f"{one} {name}"
        for one in imports_of("mllm")
        if one.module.split(".")[0] == "vision_moe"
        for name in one.names or [""]
        if one.module != "vision_moe" or (name and name not in vision_moe.__all__)
    ]
    assert not private


def test_cli_imports_train_and_demo_lazily() -> None:
    eager = [
        str(one)
        for one in imports_of("mllm")
        if one.module.split(".")[0] in ("train", "demo") and not one.in_function
    ]
    assert not eager
