"""Statistics of images against values worked by hand."""

from __future__ import annotations

import pytest
import torch

from genalign.metrics.image import grid_energy, high_frequency, saturation


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
