"""The floors of the house, read from the imports: they go down, never up, never sideways across wings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "neuron_lightning"

_GROUND = {"errors"}
_BACKENDS = _GROUND | {"config"}
_PARALLEL = _BACKENDS | {"backends"}
_STATE = _PARALLEL | {"parallel"}
_CONTENT = _STATE | {"checkpoint", "optim"}
_TRAINER = _CONTENT | {"models", "data"}

MAY_IMPORT = {
    "errors": set(),
    "config": _GROUND,
    "backends": _BACKENDS,
    "testing": _STATE,
    "parallel": _PARALLEL,
    "checkpoint": _STATE,
    "optim": _STATE,
    "models": _CONTENT,
    "data": _CONTENT,
    "lightning": _TRAINER,
    "compat": _TRAINER | {"lightning"},
    "cli": _TRAINER | {"lightning", "compat"},
    "__init__": set(),  # names are resolved lazily, as text
}
"""Floor -> the floors below it that it may import (its own is always allowed)."""

ONLY_IN = {
    "torch_xla": ("backends/xla",),
    "torch_neuronx": ("backends/xla",),
    "neuronx_distributed": ("backends/xla",),
    "lightning": ("lightning/", "compat/", "cli/"),
    "pytorch_lightning": (),
}
"""Foreign package -> the only places that may import it."""

ONLY_LAZILY = {"transformers", "tokenizers", "matplotlib", "jsonargparse", "tensorboard"}
"""Packages that may be missing: imported inside functions."""

MAY_READ_ENVIRONMENT = (
    "backends/",
    "config.py",
    "lightning/launch.py",
    "lightning/processes.py",
    "testing.py",
)


@dataclass(frozen=True)
class Import:
    """One imported module, where, and whether only when a function runs."""

    where: str
    floor: str
    module: str
    lazy: bool


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    floor = place(path).split("/")[0].removesuffix(".py")
    for node in ast.walk(tree):
        where = f"{place(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(where, floor, name.name, id(node) in inside)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: a relative import"
            assert node.module is not None
            for name in node.names:
                yield Import(where, floor, f"{node.module}.{name.name}", id(node) in inside)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


ALL = [found for path in sources() for found in imports_of(path)]


def test_there_are_imports_to_check() -> None:
    assert len(ALL) > 100
    assert {found.floor for found in ALL} - {"__init__"} <= set(MAY_IMPORT)


def test_imports_go_down_only() -> None:
    wrong = []
    for found in ALL:
        if found.module.split(".")[0] == "neuron_lightning":
            target = found.module.split(".")[1]
            if target != found.floor and target not in MAY_IMPORT[found.floor]:
                wrong.append(f"{found.where}: {found.floor} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_foreign_packages_stay_in_their_rooms(package: str) -> None:
    allowed = ONLY_IN[package]
    users = [found.where for found in ALL if found.module.split(".")[0] == package]
    assert [where for where in users if not (allowed and where.startswith(allowed))] == []


def test_optional_packages_are_imported_lazily() -> None:
    eager = [found.where for found in ALL if found.module.split(".")[0] in ONLY_LAZILY and not found.lazy]
    assert eager == []


def test_the_environment_is_read_in_few_places() -> None:
    readers = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
                readers.append(f"{place(path)}:{node.lineno}")
    assert [where for where in readers if not where.startswith(MAY_READ_ENVIRONMENT)] == []
