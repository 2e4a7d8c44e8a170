"""The files of the house, as the tests of its rules see them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
ROOMS = ("stoker", "dataio", "parallel", "kernels", "pretrain", "launch")


def shipped() -> list[Path]:
    """Every Python file of the distribution, relative to the checkout."""
    return [path for room in ROOMS for path in python_files(room)]


def python_files(folder: str) -> list[Path]:
    return sorted(path.relative_to(HOME) for path in (HOME / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((HOME / path).read_text(), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import in a file, at any depth; a relative one as if it were absolute."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            yield node.lineno, ".".join([*package, *([node.module] if node.module else [])])


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
