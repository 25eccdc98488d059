"""Rewards with limits: the published rule on numbers worked by hand, and rounds of training with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipes import flow_grpo
from genalign.cli.base_samples import referenced
from genalign.cli.generation_settings import RewardChoice
from genalign.scoring.score import NamedReward, parts
from genalign.training.credit_trial import try_credit
from genalign.training.trainer import Trainer
from genalign.types import Prompt, TrainableReward
from pipelines import SD3
from rewards.constrained import Constrained, moved_multipliers
from rewards.pairwise import BradleyTerry, WinRateReward
from rewards.shaped import PreferenceAsReward
from tests.genalign.training.toy_runs import SETTINGS, redness, toy_trainer

PROMPTS = [Prompt("a"), Prompt("b"), Prompt("b")]
SAMPLES = torch.zeros(3, 3, 2, 2)


def gives(*scores: float) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    return lambda samples, prompts: torch.tensor(scores)[: len(samples)]


def greenness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 1].flatten(1).mean(1)


def test_weights_are_those_of_the_published_rule() -> None:
    multipliers, limits = torch.zeros(2), torch.tensor([0.6, 0.2], dtype=torch.float64)
    expected = [(0.5031249593, 0.4968750407), (0.5000001221, 0.4937504475), (0.4937504475, 0.4968746746)]
    for means, weights in zip([(0.5, 0.3), (0.7, 0.3), (0.8, 0.1)], expected, strict=True):
        multipliers = moved_multipliers(multipliers, torch.tensor(means, dtype=torch.float64), limits, 0.5)
        assert multipliers.sigmoid().tolist() == pytest.approx(weights, abs=1e-8)
    assert moved_multipliers(multipliers, torch.tensor([math.nan, 0.2]), limits, 0.5).tolist() == pytest.approx(
        multipliers.tolist()
    )


def test_a_reward_above_its_limit_loses_weight_and_comes_back_from_its_tensors() -> None:
    rewards = {"high": gives(2.0, 4.0, math.nan), "low": gives(0.0, 0.5, 1.0)}
    reward = Constrained(rewards, {"high": 1.0, "low": 2.0}, learning_rate=1.0, batch_size=3)
    assert isinstance(reward, TrainableReward)
    assert reward(SAMPLES, PROMPTS).tolist() == pytest.approx([1.0, 2.25, math.nan], nan_ok=True)
    metrics = reward.update(SAMPLES, PROMPTS, range(3))
    assert (metrics["mean.high"], metrics["mean.low"]) == (3.0, 0.5)
    assert metrics["weight.high"] < 0.5 < metrics["weight.low"]
    other = Constrained(rewards, {"high": 1.0, "low": 2.0})
    other.load_tensors(reward.tensors())
    assert other.weights == reward.weights
    with pytest.raises(ValueError, match="other constrained rewards"):
        Constrained({"high": redness}, {"high": 1.0}).load_tensors(reward.tensors())


def test_its_gradient_is_the_weighted_one() -> None:
    reward = Constrained({"red": redness, "green": greenness}, {"red": 0.0, "green": 0.0})
    samples = torch.rand(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(samples, PROMPTS[:2]).sum(), samples)
    expected = torch.autograd.grad((0.5 * redness(samples, []) + 0.5 * greenness(samples, [])).sum(), samples)[0]
    torch.testing.assert_close(gradient, expected)


def test_rounds_move_the_weights_and_a_state_resumes_them(tiny_folder: Path) -> None:
    def trainer() -> tuple[Trainer, Constrained]:
        reward = Constrained({"red": redness, "green": greenness}, {"red": -9.0, "green": 9.0}, learning_rate=1.0)
        return toy_trainer(SD3.load(tiny_folder), flow_grpo(window=1), reward, replace(SETTINGS, rounds=3)), reward

    run, reward = trainer()
    result = next(run.rounds())
    assert result.metrics["red/weight.red"] < 0.5 < result.metrics["red/weight.green"]
    again, restored = trainer()
    again.restore(run.state())
    assert restored.weights == reward.weights


def test_what_it_holds_is_seen_by_warnings_and_commands(caplog: pytest.LogCaptureFixture) -> None:
    bounded = PreferenceAsReward(redness, "refs.json")
    reward = Constrained({"red": redness, "bounded": bounded}, {"red": 1.0, "bounded": 1.0})
    assert [place for place, part in parts(reward) if part is bounded] == ["rewards.bounded"]
    assert referenced(RewardChoice(reward)) == [bounded]
    try_credit(flow_grpo(), [NamedReward("capped", reward)], prompts=3, group_size=4, steps=2)
    assert "reward 'capped' saturates (PreferenceAsReward), but the credit GroupRelative" in caplog.text


def test_a_reward_of_groups_is_not_constrained() -> None:
    """Its samples are scored in parts once more."""
    rewards = {"red": redness, "wins": WinRateReward(BradleyTerry(redness))}
    with pytest.raises(ValueError, match="reward 'wins' compares the samples of a prompt with each other"):
        Constrained(rewards, {"red": 1.0, "wins": 1.0})


def test_a_constraint_without_a_limit_is_named() -> None:
    with pytest.raises(ValueError, match=r"reward 'green' has no limit: give limits\.green"):
        Constrained({"red": redness, "green": greenness}, {"red": 1.0})
    with pytest.raises(ValueError, match="limits of blue belong to no reward"):
        Constrained({"red": redness}, {"red": 1.0, "blue": 2.0})
    with pytest.raises(ValueError, match="no rewards to constrain"):
        Constrained({}, {})
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        Constrained({"red": redness}, {"red": 1.0}, learning_rate=0.0)
