"""Noise-aware scorers of audio with a trained copy of CLAP; tests/genalign/cli/test_steer.py trains image scorers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genalign.search.noise_aware import LevelQuality, NoiseAware
from genalign.types import Prompt
from rewards.backbones.clap_encoder import load_clap
from rewards.noise_aware import ClapLatentScorer, ClapScorer, ScorerReward, load_scorer, save_scorer
from tests.rewards.tiny_clap import RATE, write_clap

PROMPTS = [Prompt("an A4 sine tone"), Prompt("a C5 organ tone")]


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clap(tmp_path_factory.mktemp("clap")))


def _clips() -> torch.Tensor:
    return torch.rand(2, 1, RATE, generator=torch.Generator().manual_seed(0)) - 0.5


def test_training_changes_the_tower_but_no_batch_statistics(clap: str) -> None:
    torch.manual_seed(0)
    student, level = ClapScorer(clap, RATE, hidden=8), torch.tensor([0.9, 0.1])
    statistics = {name: tensor.clone() for name, tensor in student.named_buffers() if "running" in name}
    student(_clips(), level, PROMPTS).sum().backward()
    gradient = student.get_parameter("tower.model.audio_projection.linear1.weight").grad
    assert gradient is not None and bool(gradient.any())
    assert statistics and all(torch.equal(student.get_buffer(name), tensor) for name, tensor in statistics.items())
    assert all(parameter.grad is None for parameter in load_clap(clap).parameters())
    scores = student(_clips(), level, PROMPTS)
    assert scores.shape == (2,) and not torch.equal(scores, student(_clips(), level.flip(0), PROMPTS))


def test_a_scorer_survives_a_round_trip(clap: str, tmp_path: Path) -> None:
    student, path = ClapScorer(clap, RATE, hidden=8).eval(), tmp_path / "scorer.safetensors"
    save_scorer(path, NoiseAware(student, (LevelQuality(0.2, 0.5, 0.5, 0.0),), 3.0, 2.0))
    again = load_scorer(path)
    assert isinstance(again.student, ClapScorer) and again.qualities == (LevelQuality(0.2, 0.5, 0.5, 0.0),)
    expected = 3.0 + 2.0 * student(_clips(), torch.full((2,), 0.2), PROMPTS)
    torch.testing.assert_close(ScorerReward(path)(_clips(), PROMPTS), expected)
    started = ClapScorer(clap, RATE, hidden=8, start=str(path))
    assert torch.equal(started.read[0].weight, student.read[0].weight)  # of a Sequential


def test_a_latent_scorer_uses_its_own_decoder(clap: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    of_clips, path = ClapScorer(clap, RATE, hidden=8), tmp_path / "scorer.safetensors"
    save_scorer(path, NoiseAware(of_clips, (LevelQuality(0.2, 0.5, 0.5, 0.0),)))
    student = ClapLatentScorer(clap, RATE, channels=3, width=4, depth=1, hidden=8, start=str(path))
    assert torch.equal(student.read[0].weight, of_clips.read[0].weight)  # of a Sequential
    save_scorer(path, NoiseAware(student, (LevelQuality(0.2, 0.5, 0.5, 0.0),)))
    with pytest.raises(ValueError, match="scores latents, but rewards take samples"):
        ScorerReward(path)
    latents, level = torch.randn(2, 3, 20), torch.tensor([0.9, 0.1])
    spectra = student.decoder_target(_clips())
    assert student.decoder(latents).shape == spectra.shape
    student.decoder.forward = lambda latents: spectra  # an exact decoder
    torch.testing.assert_close(student(latents, level, PROMPTS), of_clips(_clips(), level, PROMPTS))
    with pytest.raises(ValueError, match="takes clips of 1 s, and the model generates 2 s: use a ClapScorer"):
        student.decoder_target(torch.zeros(2, 1, 2 * RATE))
