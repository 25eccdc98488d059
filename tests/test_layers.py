"""Imports go one way: scripts -> pipelines, rewards -> genalign."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.packages import folder_of

FORBIDDEN = {
    "genalign": {"pipelines", "rewards", "scripts", "tests"},
    "pipelines": {"rewards", "scripts", "tests"},
    "rewards": {"pipelines", "scripts", "tests"},
    "scripts": {"tests"},
}
COMPOSITION_ROOT = folder_of("genalign") / "cli.py"


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield (node.module or "").split(".")[0]


def test_imports_go_one_way() -> None:
    wrong = [
        f"{path} imports {name}"
        for package, forbidden in FORBIDDEN.items()
        for path in sorted(folder_of(package).rglob("*.py"))
        if path != COMPOSITION_ROOT
        for name in _imports(path)
        if name in forbidden
    ]
    assert wrong == []


def test_types_import_torch_alone() -> None:
    assert set(_imports(folder_of("genalign") / "types.py")) <= {
        "__future__",
        "collections",
        "dataclasses",
        "typing",
        "torch",
    }
