"""Statistics of images against values worked by hand."""

from __future__ import annotations

import pytest
import torch

from genalign.metrics.image import (
    brightness,
    contrast,
    grid_energy,
    high_frequency,
    object_area,
    photometric_variety,
    saturation,
)


def test_statistics_by_hand() -> None:
    half = torch.zeros(1, 3, 16, 16)
    half[:, 0, :, :8] = 1.0  # one edge, at a multiple of 8
    assert saturation(half).item() == 0.5
    assert grid_energy(half).item() > 5
    assert abs(grid_energy(torch.rand(64, 3, 64, 64)).mean().item()) < 0.02
    checkers = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    fine, flat = checkers.expand(1, 3, 16, 16).float(), torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert high_frequency(fine).item() == pytest.approx(0.0, abs=1e-4)
    assert high_frequency(flat).item() < -2
    with pytest.raises(ValueError, match="no edge of blocks of 8"):
        grid_energy(torch.rand(1, 3, 8, 8))


def test_variety_of_colors_by_hand() -> None:
    """Saturation 0.5 and 0, value 0.5 and 0.75, contrast 1/6 and 1/4."""
    rows = [[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.5] * 3, [1.0] * 3]]  # two images of two pixels
    images = torch.tensor(rows).permute(0, 2, 1)[:, :, None]
    assert photometric_variety(images) == pytest.approx(0.25 + 0.125 + 0.0416666667, abs=1e-8)
    assert photometric_variety(images[:1].repeat(3, 1, 1, 1)) == 0
    assert photometric_variety(images.flip(0).repeat(2, 1, 1, 1)) == pytest.approx(0.4166666667, abs=1e-8)


def test_brightness_contrast_and_the_area_of_objects_by_hand() -> None:
    image = torch.full((2, 3, 10, 10), 0.5)
    image[0, :, 2:6, 3:5] = 0.9  # 8 of 100 pixels
    image[0, :, 8, 8] = 0.55  # too close to the background
    assert object_area(image).tolist() == pytest.approx([0.08, 0.0])
    assert brightness(image).tolist() == pytest.approx([0.5 + 8 * 0.004 + 0.0005, 0.5])
    gray = image[0].mean(0)
    assert contrast(image).tolist() == pytest.approx([float(gray.std(correction=0)), 0.0], abs=1e-6)
    image[1, 0, 4, 4] = torch.nan
    assert object_area(image).isnan().tolist() == [False, True]
