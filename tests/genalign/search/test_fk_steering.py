"""Feynman-Kac steering on pipelines: the cost, the weights of guided moves, and what is refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genalign.diffusion.paths import FlowPath
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import DDIM, ODE, FlowSDE
from genalign.scoring.budget import Ledger, Metered, metered_reward
from genalign.scoring.score import NamedReward
from genalign.search import BestOfN, Budget, DoobGuide, FKSteering, RewardGradient, search
from genalign.search.engine import SearchRun
from genalign.search.guidance import Guide, guided_log_ratio
from genalign.search.strategy import PromptBudget, count_calls
from genalign.types import Conditioning, Grid, NoiseLevel, Prompt
from pipelines import SD3

SAMPLING = Sampling(num_steps=6, sigmas=(1.0, 0.85, 0.7, 0.5, 0.35, 0.2))
PROMPTS = ("a circle", "two squares")


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


class Gauss:
    """Data N(0, 1) in ``width`` dimensions with its exact network, and nothing to decode."""

    def __init__(self, width: int) -> None:
        self.width, self.path, self.denoiser = width, FlowPath(), nn.Identity()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"none": torch.zeros(len(prompts), 1)})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        uniform = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        sigma = 3 * uniform / (1 + 2 * uniform)
        return Grid(sigma[:-1], 1 - sigma, sigma)

    def level(self, u: Tensor) -> NoiseLevel:
        return NoiseLevel(u, 1 - u, u)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.randn(len(seeds), self.width, generator=torch.Generator().manual_seed(seeds[0]))

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        alpha, sigma = level.alpha.float(), level.sigma.float()
        return (sigma - alpha) / (alpha**2 + sigma**2) * x

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def first(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("guide", [None, RewardGradient(), DoobGuide(4)], ids=["no guide", "gradient", "doob"])
def test_ledger_equals_count(tiny: SD3, guide: Guide | None, guidance: float) -> None:
    ledger = Ledger()
    rewards = [NamedReward("red", metered_reward("red", redness, ledger))]
    asked = [Prompt(text) for text in PROMPTS]
    run = SearchRun(Metered(tiny, ledger), asked, rewards, SAMPLING.grid(tiny), guidance, 4, "0")
    true: Counter[str] = Counter()
    tiny.denoiser.register_forward_hook(
        lambda module, given, keywords, output: true.update(forward=len(keywords["hidden_states"])), with_kwargs=True
    )
    strategy = FKSteering(3, lam=5.0, guide=guide)
    finished = strategy(run, PromptBudget())
    assert run.spent.nfe == true["forward"]
    assert run.spent.counts == {call: 2 * count for call, count in count_calls(run, strategy).counts.items()}
    assert finished.candidates.prompt.tolist() == [0, 1]  # prompts never exchange particles


def test_steering_beats_one_sample_and_lam_0_equals_best_of_n(tiny: SD3) -> None:
    plain = search(tiny, PROMPTS, redness, BestOfN(8, DDIM(1.0)), sampling=SAMPLING)
    steered = search(tiny, PROMPTS, redness, FKSteering(8, lam=200.0), sampling=SAMPLING)
    single = search(tiny, PROMPTS, redness, BestOfN(1, DDIM(1.0)), sampling=SAMPLING)
    assert bool((steered.scores > single.scores).all())
    nothing = search(tiny, PROMPTS, redness, FKSteering(8, lam=0.0), sampling=SAMPLING)
    torch.testing.assert_close(nothing.scores, plain.scores, rtol=0, atol=1e-5)  # lam 0 weighs all alike


@pytest.mark.parametrize(
    "guide", [None, RewardGradient(), RewardGradient(0.5), DoobGuide(8, tau=1.0, gamma=0.5)], ids=repr
)
def test_guide_leaves_target_unchanged(guide: Guide | None) -> None:
    """N(0, s^2) tilted by exp(x) has mean s^2, however its particles were pushed."""
    pipeline: Any = Gauss(1)
    grid = pipeline.grid(20)
    run = SearchRun(Metered(pipeline, Ledger()), [Prompt("")], [NamedReward("first", first)], grid, 1.0, 4000, "0")
    finished, state = FKSteering(4000, 1.0, guide=guide).steered(run, 4000)
    weights = torch.softmax(state.log_weights, dim=0)
    # 4000 particles of deviation 0.9, of which a third or more count: 0.025 is one standard error
    assert float(weights @ finished.scores[:, 0].double()) == pytest.approx(_spread(grid) ** 2, abs=0.075)


def _spread(grid: Grid) -> float:
    """The exact deviation of unsteered samples: DDIM(1) with the exact network is linear in x and noise."""
    variance = 1.0
    for i in range(len(grid)):
        step = grid[i]
        alpha, sigma = float(step.alpha), float(step.sigma)
        velocity = (sigma - alpha) / (alpha**2 + sigma**2)
        x0, eps = 1 - sigma * velocity, 1 + alpha * velocity
        moved = DDIM(1.0)(step)
        variance = (float(step.alpha_next) * x0 + float(moved.c) * eps) ** 2 * variance + float(moved.s) ** 2
    return math.sqrt(variance)


def test_guided_log_ratio_values() -> None:
    noise, shift, std = torch.randn(5, 2, 3), torch.randn(5, 2, 3), 0.7
    x = shift + std * noise
    p, q = torch.distributions.Normal(0.0, std), torch.distributions.Normal(shift, std)
    expected = (p.log_prob(x) - q.log_prob(x)).flatten(1).sum(1)
    torch.testing.assert_close(guided_log_ratio(noise, shift, std).float(), expected, rtol=1e-4, atol=1e-4)


def test_guide_raises_reward(tiny: SD3) -> None:
    strategy = FKSteering(2, lam=200.0)
    plain = search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING).scores.mean()
    guided = search(tiny, PROMPTS, redness, replace(strategy, guide=RewardGradient(20.0)), sampling=SAMPLING).scores
    assert guided.mean() > plain


def test_budget_sets_particle_count(tiny: SD3) -> None:
    result = search(tiny, PROMPTS[0], redness, FKSteering(None), Budget(nfe=40), SAMPLING)
    assert result.ledger.nfe == 6 * 6  # six particles of six steps


def test_invalid_steering_is_refused(tiny: SD3) -> None:
    with pytest.raises(ValueError, match="moves without noise"):
        search(tiny, PROMPTS, redness, FKSteering(4, kernel=ODE()), sampling=SAMPLING)
    with pytest.raises(ValueError, match="needs a kernel to move particles by"):
        search(tiny, PROMPTS, redness, FKSteering(4, kernel=None), sampling=SAMPLING)
    with pytest.raises(ValueError, match="use DoobGuide, which needs none"):
        strategy = FKSteering(2, kernel=FlowSDE(0.7), guide=RewardGradient())
        search(tiny, PROMPTS, lambda samples, prompts: redness(samples, prompts).detach(), strategy, sampling=SAMPLING)
