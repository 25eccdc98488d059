"""What the tests of all families share."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.pipelines.tiny_checkpoints import FAMILIES, FolderOf


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """The checkpoint of a family, built once."""

    @functools.cache
    def build(name: str) -> Path:
        return FAMILIES[name].save(tmp_path_factory.mktemp("tiny") / name)

    return build
