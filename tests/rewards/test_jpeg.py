from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from genalign.types import Prompt
from rewards.backbones.pixels import pictures
from rewards.jpeg import compressibility, incompressibility

PROMPTS = [Prompt("anything")] * 3


def images() -> torch.Tensor:
    """Grey, a gradient, and noise."""
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.full((3, 32, 32), 0.5), torch.linspace(0, 1, 32).expand(3, 32, 32), noise])


def test_sizes_are_those_of_the_files_that_pillow_writes() -> None:
    for quality in (95, 40):
        expected = []
        for image in images():
            file = io.BytesIO()
            array = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            Image.fromarray(array).save(file, "JPEG", quality=quality)
            expected.append(file.getbuffer().nbytes / 1000)
        assert incompressibility(images(), PROMPTS, quality).tolist() == pytest.approx(expected)
        assert torch.equal(compressibility(images(), PROMPTS, quality), -incompressibility(images(), PROMPTS, quality))


def test_what_is_simple_compresses_better() -> None:
    grey, gradient, noise = compressibility(images(), PROMPTS).tolist()
    assert 0 > grey > gradient > noise
    assert float(incompressibility(images(), PROMPTS, 10)[2]) < -noise


def test_an_image_without_pixels_is_nan_alone() -> None:
    broken = images()
    broken[1, 2, 5, 5] = torch.nan
    broken[2, 0, 0, 0] = torch.inf
    scores = incompressibility(broken, PROMPTS)
    assert scores.isnan().tolist() == [False, True, True]
    assert scores[0] == incompressibility(images()[:1], PROMPTS[:1])[0]


def test_pixels_are_rounded_and_clamped() -> None:
    values = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.5]).expand(1, 3, 1, 6)
    (picture,) = pictures(values)
    assert picture is not None
    assert np.array(picture)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    eighths = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    assert torch.equal(torch.from_numpy(np.array(pictures(eighths)[0]))[..., 1].flatten(), torch.arange(256).byte())
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        pictures(values[0])
