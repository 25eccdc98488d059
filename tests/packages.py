"""Where the packages lie that are tested: those of the checkout, or of an installed wheel."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""


def folder_of(package: str) -> Path:
    """The folder of an importable package."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
