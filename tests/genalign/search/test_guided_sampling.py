"""Noisy reward guidance: exact on Gaussian data, its guides on the tiny pipeline, and its costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.cli.parsing import parse
from genalign.cli.steer import Steer
from genalign.diffusion.paths import VPPath
from genalign.diffusion.transitions import DDIM, ODE, transition
from genalign.reward_learning.noise_aware import LevelQuality, RewardIdentity
from genalign.scoring.score import NamedReward
from genalign.search import NRG, BestOfN, Budget, DoobGuide, FKSteering, NoiseAwareGradient, RewardGradient, search
from genalign.search.engine import SearchRun
from genalign.search.guidance import ode_shift
from genalign.search.noise_aware import NoiseAware, ScorerLevel
from genalign.types import Conditioning, Grid, NoiseLevel, Prompt, RewardFunction
from pipelines import SD3
from tests.genalign.search.test_noise_aware import Linear
from tests.genalign.search.tiny_searches import PROMPTS, SAMPLING, Gauss, plan, redness

M, S, RHO, SIGMA = 0.5, 0.8, 0.7, 0.6  # fixture F10: data N(M, S^2), reward RHO x, at the level SIGMA


class WideGauss(Gauss):
    """Data N(``mean``, S^2), its exact velocity, and float64 latents."""

    def __init__(self, mean: float, sigmas: Sequence[float]) -> None:
        self.mean, self.sigmas = mean, sigmas

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        sigma = torch.tensor([*self.sigmas, 0.0], dtype=torch.float64)
        return Grid(sigma[:-1], 1 - sigma, sigma)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.tensor([[-0.4], [0.9]], dtype=torch.float64)[: len(seeds)]

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning | None, guidance: float = 1.0) -> Tensor:
        t = float(level.sigma)
        slope = (t - (1 - t) * S**2) / ((1 - t) ** 2 * S**2 + t * t)
        return slope * (x - (1 - t) * self.mean) - self.mean


def run_of(pipeline: WideGauss) -> SearchRun:
    rewards = [NamedReward("x", lambda x, _: x[:, 0])]
    return SearchRun(pipeline, [Prompt("")], rewards, pipeline.grid(0), 1.0, 4, "0")


def test_guided_velocity_is_that_of_the_tilted_gaussian() -> None:
    """Fixture F10: grad r_t, the shift of v, and the tilted velocity."""
    pipeline = WideGauss(M, [SIGMA, 0.35])
    run = run_of(pipeline)
    start, step = run.start(2), run.grid[0]
    found = RewardGradient()(run, start, ODE(), RHO)
    torch.testing.assert_close(found.gradient, torch.full_like(start.x, 0.387543252595), rtol=0, atol=1e-8)
    moved = run.move(start, found.prediction, ODE(), ode_shift(step) * found.gradient)
    velocity = (moved.x - start.x) / (float(step.sigma_next) - SIGMA)
    plain = torch.tensor([[-0.946366782007], [0.0207612456747]], dtype=torch.float64)
    torch.testing.assert_close(found.prediction, plain, rtol=0, atol=1e-8)
    torch.testing.assert_close(velocity - plain, torch.full_like(plain, -0.581314878893), rtol=0, atol=1e-8)
    tilted = torch.tensor([[-1.5276816609], [-0.560553633218]], dtype=torch.float64)
    torch.testing.assert_close(velocity, tilted, rtol=0, atol=1e-8)


def test_samples_are_those_of_the_tilted_gaussian() -> None:
    """From one noise, the guided sampler of N(M, S^2) ends where the plain one of N(M + RHO S^2, S^2) does."""
    sigmas = [0.98, 0.7, 0.4, 0.1]
    guided = NRG(RHO, candidates=2)(run_of(WideGauss(M, sigmas)), None)
    tilted = BestOfN(2)(run_of(WideGauss(M + RHO * S**2, sigmas)), None)
    torch.testing.assert_close(guided.samples, tilted.samples, rtol=0, atol=1e-8)


def test_the_shift_is_the_move_of_the_tilted_prediction_on_every_path() -> None:
    """On a variance-preserving path, where alpha^2 + sigma^2 = 1, by moving the noise that the network predicts."""
    angles = torch.tensor([1.2, 0.7, 0.0], dtype=torch.float64)
    grid = Grid(angles[:-1], torch.cos(angles), torch.sin(angles))
    x, eps, g = (torch.randn(3, 2, generator=torch.Generator().manual_seed(n)).double() for n in range(3))
    for index in range(2):
        step = grid[index]
        plain, tilted = (
            transition(VPPath(), ODE(), x, noise, step).mean for noise in (eps, eps - float(step.sigma) * g)
        )
        torch.testing.assert_close(tilted - plain, ode_shift(step) * g)


def test_moves_of_fk_steering_keep_their_factor() -> None:
    """A stochastic move is shifted by s^2 g, and one without noise not at all."""
    pipeline = WideGauss(M, [SIGMA, 0.35])
    strategy = FKSteering(1, RHO, kernel=DDIM(1.0), guide=RewardGradient(), start=0.0, stop=0.0)
    run = run_of(pipeline)
    particles, _, _ = strategy._advance(run, run.start(1), 1, strategy.kernel or ODE())
    other = run_of(pipeline)
    start = other.start(1)
    plain = other.move(start, other.predict(start), DDIM(1.0))
    std = float(DDIM(1.0)(run.grid[0]).s)
    torch.testing.assert_close(particles.x - plain.x, torch.full_like(plain.x, std**2 * 0.387543252595))


def test_pure_noise_is_not_shifted() -> None:
    pipeline = WideGauss(M, [1.0, 0.5])
    guided, plain = (
        strategy(run_of(pipeline), None) for strategy in (NRG(RHO, candidates=1, highest_noise=0.4), BestOfN(1))
    )
    torch.testing.assert_close(guided.samples, plain.samples)
    with pytest.raises(ValueError, match="pure noise"):
        ode_shift(pipeline.grid(0)[0])


def test_guidance_raises_the_reward_and_lam_0_is_plain_sampling(tiny: SD3) -> None:
    plain, still, guided = (
        search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING)
        for strategy in (BestOfN(2), NRG(0.0, 2), NRG(200.0, 2))
    )
    assert torch.equal(still.samples, plain.samples)
    assert bool((guided.scores > plain.scores).all())
    # five steps, of which the first, at sigma 1, has no gradient
    counts = guided.ledger.counts
    assert counts["nfe"] == 2 * 2 * 5 and counts["nfe backward"] == 2 * 2 * 4
    assert counts["decode"] == 2 * 2 * (4 + 1) and counts["decode backward"] == 2 * 2 * 4


def noise_aware(levels: Sequence[float], reward: RewardFunction = redness) -> NoiseAware:
    """A scorer of latents that expects twice the mean of their first channel."""
    weights = {"read.weight": torch.tensor([[2.0, 0.0, 0.0, 0.0]]), "read.bias": torch.zeros(1)}
    scored = tuple(ScorerLevel(LevelQuality(level, 0.5, 0.5, 0.1), weights) for level in levels)
    return NoiseAware(lambda reward: Linear(4), "latents", scored, RewardIdentity.of(reward))


@pytest.mark.parametrize("through_denoiser", [True, False])
def test_a_noise_aware_reward_guides_without_decoding(tiny: SD3, through_denoiser: bool) -> None:
    guide = NoiseAwareGradient(noise_aware([0.6]), through_denoiser=through_denoiser)
    strategy = NRG(100.0, 1, guide)
    counts = search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING).ledger.counts
    assert counts["reward/noise-aware"] == counts["reward/noise-aware backward"] == 2  # at the level 0.6 alone
    assert counts.get("nfe backward", 0) == (2 if through_denoiser else 0)
    assert counts["decode"] == 2
    on_its_grid = NRG(100.0, 1, NoiseAwareGradient(noise_aware([float(tiny.grid(6).noise_share[2])])))
    assert plan(tiny, on_its_grid, Budget(nfe=40)).counts["reward/noise-aware"] == 1


def test_the_gradient_of_a_noise_aware_reward(tiny: SD3) -> None:
    run = SearchRun(tiny, [Prompt(PROMPTS[0])], [NamedReward("red", redness)], SAMPLING.grid(tiny), 1.0, 4, "0")
    batch = run.advance(run.start(2), 2)
    fixed = NoiseAwareGradient(noise_aware([0.6]), 0.5, False)(run, batch, ODE(), 3.0).gradient
    expected = torch.zeros_like(batch.x)
    expected[:, 0] = 0.5 * 3.0 * 2.0 / (16 * 16) / 0.4  # d mean / d preview, and d preview / dx = 1 / alpha
    torch.testing.assert_close(fixed, expected)
    through = NoiseAwareGradient(noise_aware([0.6]), 0.5)(run, batch, ODE(), 3.0).gradient
    moved = (run.pipeline.path.x0(x, run.predict(replace(batch, x=x)), run.grid[2]) for x in _around(batch.x, through))
    above, below = (1.5 * 2.0 * preview[:, 0].double().flatten(1).mean(1) for preview in moved)
    slope = (above - below) / 2e-2
    torch.testing.assert_close(slope, through.double().flatten(1).norm(dim=1), rtol=2e-2, atol=1e-6)


def _around(x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    unit = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return x + 1e-2 * unit, x - 1e-2 * unit


def test_a_scorer_of_other_levels_and_doobs_guide_are_refused(tiny: SD3) -> None:
    for strategy, message in (
        (NRG(1.0, 1, NoiseAwareGradient(noise_aware([0.5]))), "validated at none of the noise levels"),
        (NRG(1.0, 1, DoobGuide()), "learns from the noise of a move"),
    ):
        with pytest.raises(ValueError, match=message):
            search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING)


@pytest.mark.parametrize("settings", [{"lam": -1.0}, {"lam": math.inf}, {"lam": 1.0, "highest_noise": 1.0}])
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lam must be finite|highest_noise is a noise level"):
        NRG(**settings)


def test_a_configuration_names_guide_and_scorer(tmp_path: Path) -> None:
    path = tmp_path / "steer.yaml"
    path.write_text("""
output: out
model: {path: shapes-sd3}
prompts: shapes:val
rewards: {r: {function: rewards.shapes.ShapesReward}}
strategy:
  class_path: genalign.NRG
  init_args:
    lam: 5
    guide:
      class_path: genalign.NoiseAwareGradient
      init_args: {scorer: {class_path: rewards.noise_aware.ScorerFile, init_args: {path: scorer.safetensors}}}
""")
    settings, _ = parse(Steer, ["--config", str(path)], "steer")
    assert isinstance(settings.strategy, NRG) and isinstance(settings.strategy.guide, NoiseAwareGradient)
