"""A tiny random SD3 pipeline, on disk and opened, and the messages of commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from genalign.__main__ import main
from pipelines import SD3
from scripts.pretrain.shapes_models import ShapesTextToImage, assemble, build_vae


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary StableDiffusion3Pipeline folder: two blocks of width 64, random weights, 64 x 64 images."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("tiny") / "sd3"
    model = ShapesTextToImage(layers=2, width=64)
    for parameter in model.transformer.parameters():  # the output layers start at zero, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.05)
    assemble(model, build_vae(), folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> SD3:
    """The tiny pipeline, freshly opened."""
    return SD3.load(tiny_folder)


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command with arguments that are refused, and return the message."""

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    return run
