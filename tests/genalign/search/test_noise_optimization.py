"""Noise optimisation on the tiny pipeline, and its penalties by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genalign.diffusion.sampling import Sampling
from genalign.scoring.budget import Budget, Ledger, Metered, metered_reward
from genalign.scoring.score import NamedReward
from genalign.search import DNO, Prune, ReNO, search
from genalign.search.engine import SearchRun
from genalign.search.noise_optimization import NoiseOptimization, noise_log_probability
from genalign.search.strategy import PromptBudget, count_calls
from genalign.types import Prompt
from pipelines import SD3

FEW = Sampling(num_steps=2, sigmas=(1.0, 0.5))
PROMPTS = ("a circle", "two squares")


def grey(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Highest for a picture that is grey all over."""
    return -(samples - 0.5).square().flatten(1).mean(1)


def _run(tiny: SD3) -> SearchRun:
    ledger = Ledger()
    rewards = [NamedReward("grey", metered_reward("grey", grey, ledger))]
    return SearchRun(Metered(tiny, ledger), [Prompt(text) for text in PROMPTS], rewards, FEW.grid(tiny), 1.0, 8, "0")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "strategy",
    [ReNO(4), DNO(4), ReNO(3, initial_search=Prune((0,), (0.5,), 4))],
    ids=["reno", "dno", "reno after pruning"],
)
def test_ledger_equals_count(tiny: SD3, strategy: NoiseOptimization, recompute: bool) -> None:
    run, chosen = _run(tiny), replace(strategy, recompute=recompute)
    chosen(run, PromptBudget())
    assert run.spent.counts == {
        call: 2 * count for call, count in count_calls(run, chosen).counts.items()
    }  # two prompts


@pytest.mark.parametrize("strategy", [ReNO(1, 100.0, norm_weight=0.0), DNO(1, 0.1)], ids=["reno", "dno"])
def test_gradients_raise_the_reward(tiny: SD3, strategy: NoiseOptimization) -> None:
    first = search(tiny, PROMPTS, grey, strategy, sampling=FEW).scores
    last = search(tiny, PROMPTS, grey, replace(strategy, iterations=20), sampling=FEW).scores
    assert bool((last > first + 1e-4).all())


def test_recompute_gives_same_samples(tiny: SD3) -> None:
    kept, again = (search(tiny, PROMPTS[0], grey, ReNO(3, recompute=r), sampling=FEW) for r in (False, True))
    torch.testing.assert_close(kept.samples, again.samples, rtol=0, atol=1e-5)


def test_initial_search_shares_budget(tiny: SD3) -> None:
    prune = Prune((0,), (0.5,))
    result = search(tiny, PROMPTS, grey, ReNO(initial_search=prune, learning_rate=0.5), Budget(nfe=60), FEW)
    spent = Counter(result.ledger.counts)
    assert spent["nfe"] + 2 * spent["nfe backward"] <= 2 * 60 and spent["nfe backward"] > 0
    alone = search(tiny, PROMPTS, grey, prune, Budget(nfe=30), FEW)
    assert bool((result.scores >= alone.scores - 1e-6).all())


def test_reno_penalty_restores_noise_norm(tiny: SD3) -> None:
    noises = 3 * torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    strategy = ReNO(norm_weight=1.0)
    variable = noises.requires_grad_(True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(strategy.penalty(variable).sum(), variable)
        variable = (variable - 0.1 * gradient).detach().requires_grad_(True)
    lengths = variable.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((2,), math.sqrt(4 * 16 * 16 - 1)), rtol=1e-3, atol=0)


def test_noise_log_probability_is_flat_for_gaussian_noise() -> None:
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    log_probability = noise_log_probability(noise, 16)
    assert float(log_probability.detach()) == pytest.approx(0.0, abs=1e-6)  # two bounds of 1
    (gradient,) = torch.autograd.grad(log_probability, noise)
    assert float(gradient.abs().max()) == 0.0
    assert float(noise_log_probability(noise.detach() + 1, 16)) < -50
    assert float(noise_log_probability(3 * noise.detach(), 16)) < -50


def test_reward_without_gradient_is_refused(tiny: SD3) -> None:
    with pytest.raises(ValueError, match="give no gradient: noise optimization needs one; use ZeroOrder or Evolution"):
        search(tiny, PROMPTS, lambda samples, prompts: grey(samples, prompts).detach(), ReNO(2), sampling=FEW)
