"""Perturbations are small, keep the shape and repeat by their seed; statistics are of every medium."""

from __future__ import annotations

import pytest
import torch

from genalign.metrics.audio import level
from genalign.reward_learning.perturbations import NUISANCES, PERTURBATIONS


def _sample(medium: str) -> torch.Tensor:
    if medium == "image":
        rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 48), indexing="ij")
        return torch.stack([rows, columns, 0.5 + 0 * rows])
    time = torch.arange(4001) / 8000
    return torch.stack([0.5 * torch.sin(2 * torch.pi * 440 * time), 0.3 * torch.sin(2 * torch.pi * 900 * time)])


@pytest.mark.parametrize(
    ("medium", "name"), [(medium, name) for medium, all_ in PERTURBATIONS.items() for name in all_]
)
def test_a_perturbation_is_small_and_repeats(medium: str, name: str) -> None:
    sample, perturb = _sample(medium), PERTURBATIONS[medium][name]
    moved = perturb(sample, 3)
    assert moved.shape == sample.shape and not torch.equal(moved, sample)
    torch.testing.assert_close(moved, perturb(sample, 3), rtol=0, atol=0)
    assert (name == "noise") == (not torch.equal(moved, perturb(sample, 4)))
    reference = sample.flip(-1) if name == "flip" else sample
    assert float((moved - reference).abs().mean()) < 0.12
    assert float(moved.min()) >= (0 if medium == "image" else -1) and float(moved.max()) <= 1


def test_levels_of_perturbed_clips() -> None:
    clip = _sample("audio")
    quieter = PERTURBATIONS["audio"]["gain"](clip, 0)
    assert float(level(quieter[None]) - level(clip[None])) == pytest.approx(-3.0, abs=1e-3)
    added = PERTURBATIONS["audio"]["noise"](clip, 0) - clip
    assert float(level(added[None]) - level(clip[None])) == pytest.approx(-40.0, abs=0.3)


@pytest.mark.parametrize("medium", ["image", "audio"])
def test_statistics_of_a_batch(medium: str) -> None:
    batch = torch.stack([_sample(medium), 0.5 * _sample(medium)])
    values = {name: statistic(batch) for name, statistic in NUISANCES[medium].items()}
    assert all(value.shape == (2,) and bool(value.isfinite().all()) for value in values.values())
