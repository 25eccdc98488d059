"""``import genalign`` is quick, and offers every public name lazily."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import genalign

SOURCE = ast.parse(Path(genalign.__file__ or "").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", genalign.__all__)
def test_a_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(genalign, name)
    assert value.__name__ == name and value.__module__.startswith("genalign.")


def test_type_checkers_see_the_same_names() -> None:
    (block,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    typed = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(genalign.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'flow_grp'"):
        genalign.flow_grp  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, genalign; assert genalign.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
