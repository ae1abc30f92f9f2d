"""Other versions of the launch image: copies of its files, with something changed, and the daemon of this process as one that has them."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tare
from tare.handlers import interpreter

SOURCE = Path(tare.__file__).parent
KILL = "__import__('os').kill(__import__('os').getpid(), 9)"


def copy(directory: Path) -> Path:
    """A package tree with the launch image alone, as it is but for its pauses; `directory` is what goes into sys.path."""
    shutil.copytree(SOURCE / "launch", directory / "tare" / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SOURCE / "__init__.py", directory / "tare")
    return change(directory, "keeper", "RESTART_PAUSE = 0.5", "RESTART_PAUSE = 0.01")


def change(tree: Path, module: str, before: str, after: str) -> Path:
    """In a module of a tree's launch image, one text for another, which must be there once."""
    path = tree / "tare" / "launch" / f"{module}.py"
    text = path.read_text()
    assert text.count(before) == 1, f"{module} has {text.count(before)} times {before!r}"
    path.write_text(text.replace(before, after))
    return tree


def bumped(directory: Path, number: int) -> Path:
    """A copy that says that it is of another version: in its greeting, and in the name that `ps` shows of its keeper."""
    tree = change(copy(directory), "wire", "\nVERSION = 2\n", f"\nVERSION = {number}\n")
    return change(tree, "keeper", 'set_name(b"tare-keeper")', f'set_name(b"tare-keeper{number}")')


def points(tree: Path, module: str, function: str) -> int:
    """How many statements a function of a tree has at which it can be killed."""
    return len(list(statements(find(ast.parse(source(tree, module)), function))))


def killed_at(tree: Path, module: str, function: str, number: int, condition: str = "True") -> Path:
    """In a tree, the process ends itself by SIGKILL before the function's statement of this number, where the condition (Python) holds."""
    parsed = ast.parse(source(tree, module))
    body, index = list(statements(find(parsed, function)))[number]
    body.insert(index, ast.parse(f"if {condition}: {KILL}").body[0])
    (tree / "tare" / "launch" / f"{module}.py").write_text(ast.unparse(parsed))
    return tree


def source(tree: Path, module: str) -> str:
    return (tree / "tare" / "launch" / f"{module}.py").read_text()


def find(parsed: ast.Module, function: str) -> ast.FunctionDef:
    """A function of a module, or a method of a class in it."""
    found = [node for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(found) == 1, f"{len(found)} functions of the name {function}"
    return found[0]


def statements(node: ast.AST) -> Iterator[tuple[list[ast.stmt], int]]:
    """(block, index) of each statement in a function, those in blocks within blocks too, but for docstrings."""
    for name in ("body", "orelse", "finalbody", "handlers"):
        block = getattr(node, name, [])
        for index, child in enumerate(block):
            if isinstance(child, ast.stmt) and not (
                isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            ):
                yield block, index
            yield from statements(child)


def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """What makes the daemon in this process one of the version in a tree."""

    def of(tree: Path) -> None:
        monkeypatch.setattr(interpreter, "PACKAGE", tree)

    return of
