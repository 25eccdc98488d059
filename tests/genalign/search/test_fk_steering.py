"""Feynman-Kac steering on pipelines, and the weights of guided moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genalign.diffusion.transitions import DDIM
from genalign.scoring.score import NamedReward
from genalign.search import BestOfN, Budget, DoobGuide, FKSteering, RewardGradient, search
from genalign.search.engine import SearchRun
from genalign.search.guidance import Guide, guided_log_ratio
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.search.tiny_searches import PROMPTS, SAMPLING, Gauss, exact_spread, redness


def test_steering_beats_one_sample_and_lam_0_equals_best_of_n(tiny: SD3) -> None:
    plain = search(tiny, PROMPTS, redness, BestOfN(8, DDIM(1.0)), sampling=SAMPLING)
    steered = search(tiny, PROMPTS, redness, FKSteering(8, lam=200.0), sampling=SAMPLING)
    single = search(tiny, PROMPTS, redness, BestOfN(1, DDIM(1.0)), sampling=SAMPLING)
    assert steered.scores.mean() > single.scores.mean()
    nothing = search(tiny, PROMPTS, redness, FKSteering(8, lam=0.0), sampling=SAMPLING)
    torch.testing.assert_close(nothing.scores, plain.scores, rtol=0, atol=1e-5)  # lam 0 weighs all alike


@pytest.mark.parametrize(
    "guide", [None, RewardGradient(), RewardGradient(0.5), DoobGuide(8, tau=1.0, gamma=0.5)], ids=repr
)
def test_guide_leaves_target_unchanged(guide: Guide | None) -> None:
    """N(0, s^2) tilted by exp(x) has mean s^2, however its particles were pushed."""
    grid, reward = Gauss().grid(20), NamedReward("x", lambda samples, prompts: samples[:, 0])
    run = SearchRun(Gauss(), [Prompt("")], [reward], grid, 1.0, 4000, "0")
    finished, state = FKSteering(4000, 1.0, guide=guide).steered(run, 4000)
    weights = torch.softmax(state.log_weights, dim=0)
    # 4000 particles of deviation 0.9, of which a third or more count: 0.025 is one standard error
    assert float(weights @ finished.scores[:, 0].double()) == pytest.approx(exact_spread(grid) ** 2, abs=0.075)


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
    result = search(tiny, PROMPTS[0], redness, FKSteering(None), Budget(nfe=34), SAMPLING)
    assert result.ledger.nfe == 6 * 5  # six particles of five steps
