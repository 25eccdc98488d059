"""Noise optimization on the tiny pipeline, and its penalties by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genalign.diffusion.sampling import Sampling
from genalign.scoring.budget import Budget
from genalign.scoring.score import NamedReward
from genalign.search import DNO, Prune, ReNO, search
from genalign.search.noise_optimization import NoiseOptimization, noise_log_probability
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.search.tiny_searches import PROMPTS

FEW = Sampling(num_steps=2, sigmas=(1.0, 0.5))


def grayness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Highest for a picture that is gray all over."""
    return -(samples - 0.5).square().flatten(1).mean(1)


@pytest.mark.parametrize("strategy", [ReNO(1, 100.0, norm_weight=0.0), DNO(1, 0.1)], ids=["reno", "dno"])
def test_gradients_raise_the_reward(tiny: SD3, strategy: NoiseOptimization) -> None:
    first = search(tiny, PROMPTS, grayness, strategy, sampling=FEW).scores
    last = search(tiny, PROMPTS, grayness, replace(strategy, iterations=20), sampling=FEW).scores
    assert bool((last > first + 1e-4).all())


@pytest.mark.parametrize("strategy", [ReNO(4, 10.0), DNO(4, 0.1)], ids=["reno", "dno"])
def test_a_reported_reward_needs_no_gradient_and_chooses_nothing(tiny: SD3, strategy: NoiseOptimization) -> None:
    def verdict(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.from_numpy(-grayness(samples, prompts).numpy())  # as a verifier, which takes no gradient

    rewards = [NamedReward("gray", grayness), NamedReward("verdict", verdict, weight=0.0)]
    alone, both = (search(tiny, PROMPTS, some, strategy, sampling=FEW) for some in (rewards[:1], rewards))
    assert torch.equal(both.samples, alone.samples)
    assert torch.equal(both.scores[:, 1], -both.scores[:, 0])


def test_a_failed_score_stops_no_other_iteration(tiny: SD3) -> None:
    """A NaN in the gradient would make the noise, and all later samples, NaN."""
    calls = []

    def failing(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(len(samples))
        scores = grayness(samples, prompts)
        return scores * math.nan if samples.requires_grad and len(calls) % 2 else scores

    result = search(tiny, PROMPTS[0], failing, ReNO(6, 10.0, norm_weight=0.0), sampling=FEW)
    scores = [score for node in result.lineage for _, (score,) in node["scores"]]
    assert [score is None for score in scores] == [False, True, False, True, False, False]  # the last has no gradient


def test_recompute_gives_same_samples(tiny: SD3) -> None:
    usual, recomputed = (search(tiny, PROMPTS[0], grayness, ReNO(3, recompute=r), sampling=FEW) for r in (False, True))
    torch.testing.assert_close(recomputed.samples, usual.samples, rtol=0, atol=1e-5)


def test_initial_search_shares_budget(tiny: SD3) -> None:
    prune = Prune((0,), (0.5,))
    result = search(tiny, PROMPTS, grayness, ReNO(initial_search=prune, learning_rate=0.5), Budget(nfe=60), FEW)
    spent = result.ledger.counts
    assert spent["nfe"] + 2 * spent["nfe backward"] <= 2 * 60 and spent["nfe backward"] > 0
    alone = search(tiny, PROMPTS, grayness, prune, Budget(nfe=30), FEW)
    assert bool((result.scores >= alone.scores - 1e-6).all())


def test_reno_penalty_restores_noise_norm() -> None:
    noises = 3 * torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        variable = noises.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(ReNO(norm_weight=1.0).penalty(variable).sum(), variable)
        noises = noises - 0.1 * gradient
    lengths = noises.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((2,), math.sqrt(4 * 16 * 16 - 1)), rtol=1e-3, atol=0)


def test_noise_log_probability_is_flat_for_gaussian_noise() -> None:
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    log_probability = noise_log_probability(noise, 16)
    assert float(log_probability.detach()) == pytest.approx(0.0, abs=1e-6)  # two bounds of 1
    (gradient,) = torch.autograd.grad(log_probability, noise)
    assert float(gradient.abs().max()) == 0.0
    assert float(noise_log_probability(noise.detach() + 1, 16)) < -50
    assert float(noise_log_probability(3 * noise.detach(), 16)) < -50
