"""PreviewDataset, distilling and validating noise-aware rewards on the tiny pipeline and on toys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genalign.reward_learning.noise_aware import (
    Distillation,
    LevelQuality,
    PreviewDataset,
    RewardIdentity,
    distill,
    ranking_quality,
    train_decoder,
    validate,
)
from genalign.scoring.score import NamedReward
from genalign.search import Prune, search
from genalign.search.engine import SearchRun
from genalign.search.noise_aware import NoiseAware, ScorerLevel, record_previews
from genalign.types import Prompt, RewardFunction
from pipelines import SD3
from tests.genalign.search.tiny_searches import PROMPTS, SAMPLING, redness, search_run


class Linear(nn.Module):
    """Means of the latents' channels, whichever the reward."""

    input_kind = "latents"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.read = nn.Linear(channels, 1)

    def forward(self, previews: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores: Tensor = self.read(previews.flatten(2).mean(2)).squeeze(-1)
        return scores


def _scorer(*taus: tuple[float, float], weight: float = 1.0, reward: RewardFunction = redness) -> NoiseAware:
    """A scorer of latents by the mean of their first channel; its levels have these taus, and a bias of the level."""
    weights = {"read.weight": torch.tensor([[weight, 0.0, 0.0, 0.0]])}
    levels = [
        ScorerLevel(LevelQuality(sigma, tau, 0.5, 0.1), {**weights, "read.bias": torch.tensor([sigma])})
        for sigma, tau in taus
    ]
    return NoiseAware(lambda reward: Linear(4), "latents", tuple(levels), RewardIdentity.of(reward))


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


def test_distillation_goes_from_clean_to_noisy_and_keeps_each_level() -> None:
    student, held_out, decode = Linear(1), _blurred(32, 1), nn.Identity()
    nn.init.zeros_(student.read.weight)
    assert validate(student, held_out, 0, decode).tau == 0.0
    settings = Distillation(epochs=6, batch_size=128, learning_rate=5e-2, weight_decay=0.0)
    levels = list(distill(student, _blurred(128, 0), decode, settings))
    assert [level.sigma for level in levels] == pytest.approx([0.1, 0.5, 0.9])
    slopes = [float(level.weights["read.weight"]) for level in levels]
    # the mean of four values of noise 2 sigma: least squares shrinks the slope -1 by 1 / (1 + sigma^2)
    assert slopes == pytest.approx([-1 / (1 + sigma**2) for sigma in (0.1, 0.5, 0.9)], abs=0.08)
    student.load_state_dict(levels[2].weights)
    assert validate(student, held_out, 0, decode).tau > 0.3
    student.load_state_dict(levels[0].weights)
    assert validate(student, held_out, 2, decode).tau > 0.7


def test_a_level_starts_from_the_weights_of_the_one_before() -> None:
    settings = Distillation(epochs=1, batch_size=4096, learning_rate=1e-3, weight_decay=0.0)
    student = Linear(1)
    nn.init.zeros_(student.read.weight)
    steps = [
        float(level.weights["read.weight"]) for level in distill(student, _blurred(16, 0), nn.Identity(), settings)
    ]
    assert steps == pytest.approx([-1e-3, -2e-3, -3e-3], rel=0.01)  # one step of AdamW at each level


def test_ranking_quality_values() -> None:
    clean, prompt = torch.tensor([1.0, 2.0, 3.0, 4.0, 7.0, 7.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert ranking_quality(clean, clean, prompt, 0.5) == LevelQuality(0.5, 1.0, 1.0, 0.0)
    assert ranking_quality(-clean, clean, prompt, 0.5) == LevelQuality(0.5, -1.0, 0.0, 3.0)
    assert ranking_quality(torch.zeros(6), clean, prompt, 0.5).tau == 0.0
    with pytest.raises(ValueError, match="no prompt has two samples of different reward"):
        ranking_quality(clean[4:], clean[4:], prompt[4:], 0.5)


def test_noise_level_below_least_tau_is_refused(tiny: SD3) -> None:
    scorer = _scorer((0.8, 0.05), (0.6, 0.6))

    def prune(step: int) -> None:
        search(tiny, PROMPTS, redness, Prune((step,), (0.5,), 4, scorer), sampling=SAMPLING)

    prune(2)
    with pytest.raises(ValueError, match=r"at noise level 0\.80 .* tau 0\.05, below 0\.10: prune later"):
        prune(1)
    with pytest.raises(ValueError, match=r"validated at noise levels 0\.80, 0\.60, not at 0\.40"):
        prune(3)


def test_latent_scorer_takes_the_weights_of_its_level_and_does_not_decode(tiny: SD3) -> None:
    run = search_run(tiny)
    candidates = run.advance(run.start(4), 3)
    scores = _scorer((0.8, 0.6), (0.6, 0.6))(run, candidates)
    expected = candidates.preview[:, 0].flatten(1).mean(1) + 0.6
    torch.testing.assert_close(scores[:, 0], expected)
    strategy = Prune((2,), (0.5,), 4, _scorer((0.6, 0.6)))
    counts = search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING).ledger.counts
    assert counts == {"nfe": 2 * (4 * 3 + 2 * 2), "reward/noise-aware": 2 * 4, "decode": 2 * 2, "reward/reward": 2 * 2}


@dataclass(frozen=True)
class Weighted:
    """A reward by one network, and one setting."""

    weight: float = 1.0
    scale: float = 1.0

    def network(self) -> nn.Module:
        linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, self.weight)
        return linear

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.scale * redness(samples, prompts)


@dataclass(frozen=True)
class Scaled:
    scale: float = 1.0

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.scale * redness(samples, prompts)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Scaled(2.0), r"selects by 'reward', .*Scaled, and the scorer was trained for .*Scaled with other weights"),
        (Weighted(), r"selects by 'reward', .*Weighted, and the scorer was trained for .*Scaled: train one for it"),
        (redness, r"selects by 'reward', .*redness, and the scorer was trained for"),
        (
            {"a": Scaled(), "b": redness},
            r"predicts one reward of a positive weight, and this search selects by a \(weight 1\), b",
        ),
    ],
    ids=["settings", "class", "function", "two"],
)
def test_a_scorer_of_another_reward_is_refused(tiny: SD3, reward: RewardFunction, message: str) -> None:
    scorer = _scorer((0.6, 0.6), reward=Scaled())
    with pytest.raises(ValueError, match=message):
        search(tiny, PROMPTS, reward, Prune((2,), (0.5,), 4, scorer), sampling=SAMPLING)


def test_rewards_that_only_report_stand_beside_the_scorer(tiny: SD3) -> None:
    rewards = [NamedReward("report", Scaled(3.0), 0.0), NamedReward("red", redness)]
    grid = SAMPLING.grid(tiny)
    run = SearchRun(tiny, [Prompt(PROMPTS[0])], rewards, grid, 1.0, 4, "0")
    scores = _scorer((0.6, 0.6))(run, run.advance(run.start(4), 3))
    assert bool(scores[:, 0].isnan().all()) and bool(scores[:, 1].isfinite().all())
    assert run.weighted_sum(scores).tolist() == scores[:, 1].tolist()


def test_a_reward_by_a_network_is_identified_by_its_weights() -> None:
    assert RewardIdentity.of(Weighted(1.0)) == RewardIdentity.of(Weighted(1.0, scale=1.0))
    assert RewardIdentity.of(Weighted(1.0)) != RewardIdentity.of(Weighted(1.1))
