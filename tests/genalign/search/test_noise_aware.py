"""PreviewDataset, distilling and validating noise-aware rewards on the tiny pipeline and on toys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genalign.search import Prune, search
from genalign.search.noise_aware import (
    Distillation,
    LevelQuality,
    NoiseAware,
    PreviewDataset,
    distill,
    ranking_quality,
    record_previews,
    train_decoder,
    validate,
)
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.search.tiny_searches import PROMPTS, SAMPLING, redness, search_run


class Linear(nn.Module):
    """Means of the latents' channels, and the level."""

    input_kind = "latents"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.read = nn.Linear(channels + 1, 1)

    def forward(self, previews: Tensor, sigma: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores: Tensor = self.read(torch.cat([previews.flatten(2).mean(2), sigma[:, None]], 1)).squeeze(-1)
        return scores


def _blurred(count: int, seed: int) -> PreviewDataset:
    """Scalars as latents, 2 x 2 of one value, under the more noise the higher the level."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.arange(8).repeat_interleave(count)
    clean = torch.randn(8 * count, generator=generator)
    sigmas = torch.tensor([0.9, 0.5, 0.1])
    noise = torch.randn(8 * count, 3, 1, 2, 2, generator=generator)
    previews = -clean.view(-1, 1, 1, 1, 1) + 2 * sigmas.view(1, 3, 1, 1, 1) * noise
    return PreviewDataset(previews.half(), sigmas, prompt, clean, tuple(Prompt(str(p)) for p in range(8)))


def test_previews_match_trajectories(tiny: SD3, tmp_path: Path) -> None:
    run = search_run(tiny)
    dataset = record_previews(run, 3, (0, 2, 4))
    assert dataset.previews.shape == (6, 3, 4, 16, 16) and dataset.sigmas.tolist() == pytest.approx([1.0, 0.6, 0.2])
    assert run.ledger.counts == {"nfe": 6 * 5, "decode": 6, "reward/red": 6}
    ends = redness(tiny.decode(dataset.previews[:, -1].float()), []).detach()
    torch.testing.assert_close(ends, dataset.clean, rtol=0, atol=1e-2)  # the last preview is the half precision sample
    dataset.save(tmp_path / "previews.safetensors")
    loaded = PreviewDataset.load(tmp_path / "previews.safetensors")
    assert torch.equal(loaded.previews, dataset.previews) and loaded.prompts == dataset.prompts
    assert [prompt.metadata for prompt in loaded.prompts] == [prompt.metadata for prompt in dataset.prompts]
    assert len(dataset.extend(loaded)) == 12 and dataset.extend(loaded).prompt.max() == 3


@dataclass
class Inverting:
    """A student whose decoder is to make the negative of what the pipeline makes."""

    decoder: nn.Module

    def decoder_target(self, samples: Tensor) -> Tensor:
        return 1 - samples


def test_train_decoder_fits_decoded_samples() -> None:
    def decode(latents: Tensor) -> Tensor:
        return (2 * latents).sigmoid().expand(-1, 3, -1, -1)

    student = Inverting(nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sigmoid()))
    settings = Distillation(decoder_epochs=30, decoder_learning_rate=0.02)
    losses = list(train_decoder(student, _blurred(64, 0), decode, settings))
    assert len(losses) == 30 and losses[-1] < 0.02 * losses[0]


def test_distillation_improves_ranking_at_noisiest_level() -> None:
    student, held_out, decode = Linear(1), _blurred(32, 1), nn.Identity()
    nn.init.zeros_(student.read.weight)
    before = validate(student, held_out, decode)
    stages = list(distill(student, _blurred(32, 0), decode, Distillation(epochs=8, learning_rate=3e-2)))
    after = validate(student, held_out, decode)
    assert [levels for levels, _ in stages] == [1] * 8 + [2] * 8 + [3] * 8
    assert before[0].tau == 0.0 and after[0].tau > 0.3 and after[-1].tau > 0.7
    assert after[-1].top > after[0].top and after[-1].gap < after[0].gap


def test_ranking_quality_values() -> None:
    clean, prompt = torch.tensor([1.0, 2.0, 3.0, 4.0, 7.0, 7.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert ranking_quality(clean, clean, prompt, 0.5) == LevelQuality(0.5, 1.0, 1.0, 0.0)
    assert ranking_quality(-clean, clean, prompt, 0.5) == LevelQuality(0.5, -1.0, 0.0, 3.0)
    assert ranking_quality(torch.zeros(6), clean, prompt, 0.5).tau == 0.0
    with pytest.raises(ValueError, match="no prompt has two samples of different reward"):
        ranking_quality(clean[4:], clean[4:], prompt[4:], 0.5)


def test_noise_level_below_least_tau_is_refused(tiny: SD3) -> None:
    qualities = (LevelQuality(0.8, 0.05, 0.3, 1.0), LevelQuality(0.6, 0.6, 0.9, 0.1))
    scorer = NoiseAware(Linear(4), qualities, mean=2.0, std=3.0)

    def prune(step: int) -> None:
        search(tiny, PROMPTS, redness, Prune((step,), (0.5,), 4, scorer), sampling=SAMPLING)

    prune(2)
    with pytest.raises(ValueError, match=r"at noise level 0\.80 .* tau 0\.05, below 0\.10: prune later"):
        prune(1)
    with pytest.raises(ValueError, match=r"validated at noise levels 0\.80, 0\.60, not at 0\.40"):
        prune(3)


def test_latent_scorer_does_not_decode(tiny: SD3) -> None:
    scorer = NoiseAware(Linear(4), (LevelQuality(0.6, 0.6, 0.9, 0.1),))
    strategy = Prune((2,), (0.5,), 4, scorer)
    counts = search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING).ledger.counts
    assert counts == {"nfe": 2 * (4 * 3 + 2 * 2), "reward/noise-aware": 2 * 4, "decode": 2 * 2, "reward/reward": 2 * 2}
