"""Packages, and the subpackages of genalign, import in one direction only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.packages import folder_of

FORBIDDEN = {
    "genalign": {"pipelines", "rewards", "scripts", "tests"},
    "pipelines": {"genalign.worlds", "rewards", "scripts", "tests"},
    "rewards": {"pipelines", "scripts", "tests"},
    "scripts": {"tests"},
}
COMPOSITION_ROOT = folder_of("genalign") / "cli" / "main.py"
FLOORS = {
    "cli": 10,
    "worlds": 9,
    "evaluation": 8,
    "training": 7,
    "search": 6,
    "reward_learning": 5,
    "algorithms": 4,
    "diffusion": 3,
    "scoring": 3,
    "metrics": 2,
    "runtime": 1,
    "types": 0,
    "prompts": 0,
    "assets": 0,
}
OUTSIDE_THE_ORDER = {"__init__.py", "__main__.py"}  # directly in genalign/


def _imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, at module level and inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _room(path: Path) -> str:
    return path.relative_to(folder_of("genalign")).parts[0].removesuffix(".py")


def test_packages_import_one_way() -> None:
    wrong = [
        f"{path} imports {name}"
        for package, forbidden in FORBIDDEN.items()
        for path in sorted(folder_of(package).rglob("*.py"))
        if path != COMPOSITION_ROOT
        for name in _imports(path)
        if any(f"{name}.".startswith(f"{other}.") for other in forbidden)
    ]
    assert wrong == []


def test_rooms_import_downwards_only() -> None:
    root = folder_of("genalign")
    wrong = []
    for path in sorted(root.rglob("*.py")):
        if path.parent == root and path.name in OUTSIDE_THE_ORDER:
            continue
        room = _room(path)
        assert room in FLOORS, f"{path} is in no room of the design"
        for name in _imports(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package == "genalign" and other in FLOORS and other != room and FLOORS[other] >= max(FLOORS[room], 1):
                wrong.append(f"{path.relative_to(root)} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})")
    assert wrong == []


def test_types_import_torch_alone() -> None:
    allowed = {"__future__", "collections", "dataclasses", "typing", "torch"}
    assert {name.split(".")[0] for name in _imports(folder_of("genalign") / "types.py")} <= allowed
