"""The checkpoints of the tests on a GPU, and the device that they run on."""

from __future__ import annotations

import pytest

from tests.gpu.small_runs import DEVICE
from tests.pipelines.conftest import folder_of

__all__ = ["folder_of"]


@pytest.fixture(scope="session")
def device() -> str:
    """The device of ``make test-gpu``."""
    return DEVICE
