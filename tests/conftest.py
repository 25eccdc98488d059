"""A tiny random SD3 pipeline, on disk and opened, and the messages of commands.

Modules that import torch are imported where they are used: the controller of pytest-xdist loads this file as well.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genalign.__main__ import main

if TYPE_CHECKING:
    from pipelines import SD3


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection, each of which takes half a second otherwise."""
    gc.collect()
    gc.freeze()


def _global_state() -> dict[str, object]:
    """The settings of torch that hold for the whole process; none before it is imported.

    On a machine with a GPU the precision is set for good when a model is first opened on it.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "precision of float32 products": None if torch.cuda.is_available() else torch.get_float32_matmul_precision(),
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "mode of gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
    }


@pytest.fixture(autouse=True)
def _no_global_state_is_left_changed() -> Iterator[None]:
    """Fail a test that leaves a setting of torch changed, with which later tests would run."""
    before, offline = _global_state(), os.environ.get("HF_HUB_OFFLINE")
    yield
    if offline is None:
        os.environ.pop("HF_HUB_OFFLINE", None)  # which genalign demo sets for good
    after = _global_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test left settings of torch changed (before, after): {changed}"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary StableDiffusion3Pipeline folder: two blocks of width 64, random weights, 64 x 64 images."""
    import torch

    from scripts.pretrain.shapes_models import ShapesTextToImage, assemble, build_vae

    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("tiny") / "sd3"
    model = ShapesTextToImage(layers=2, width=64)
    for parameter in model.transformer.parameters():  # the output layers start at zero, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.05)
    assemble(model, build_vae(), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_opened(tiny_folder: Path) -> SD3:
    """The tiny pipeline, to be copied."""
    from pipelines import SD3

    return SD3.load(tiny_folder)


@pytest.fixture
def tiny(tiny_opened: SD3) -> SD3:
    """The tiny pipeline, as if freshly opened."""
    return copy.deepcopy(tiny_opened)


@pytest.fixture
def small(tiny: SD3) -> SD3:
    """The tiny pipeline for images of 32 x 32, which cost half as much."""
    tiny.height = tiny.width = 8
    return tiny


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command with arguments that are refused, and return the message."""

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    return run
