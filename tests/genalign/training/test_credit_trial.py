"""The trial of a recipe's credit before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from genalign.algorithms.credit import (
    BestAndWorst,
    BestOfNCredit,
    BetaNormalized,
    GroupRelative,
    LeaveOneOut,
    NormalizedSum,
    PlainReward,
)
from genalign.algorithms.interfaces import Credit
from genalign.algorithms.multi_reward_credit import AmongCorrect, CorrelationWeighted, Decorrelated, LogTamed
from genalign.algorithms.recipe_changes import with_gradient_balance
from genalign.algorithms.recipes import dense_grpo, flow_grpo
from genalign.algorithms.step_credit import RewardGain
from genalign.diffusion.policy import Lora, Policy
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.credit_trial import try_credit
from genalign.training.trainer import Trainer
from genalign.types import AnyCallable, Prompt, RewardFunction
from pipelines import SD3
from rewards.combine import EnsembleCredit
from rewards.jpeg import compressibility
from tests.genalign.training.toy_runs import PROMPTS, SAMPLING, SETTINGS, redness


@dataclass(frozen=True)
class Bounded:
    limit: float = 1.0
    saturates: ClassVar[bool] = True

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return samples.flatten(1).mean(1).clamp(max=self.limit)


@dataclass(frozen=True)
class Doubled:
    """A reward of a reward."""

    reward: AnyCallable

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores: Tensor = 2 * self.reward(samples, prompts)
        return scores


def plain(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


def warnings(
    credit: Credit, caplog: pytest.LogCaptureFixture, reward: RewardFunction = Bounded(), weight: float = 1.0
) -> list[str]:
    caplog.clear()
    rewards = [NamedReward("aesthetics", reward, weight), NamedReward("size", plain), NamedReward("red", plain, 0.0)]
    try_credit(replace(flow_grpo(), credit=credit), rewards, prompts=3, group_size=4, steps=2)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "credit",
    [
        GroupRelative(),
        GroupRelative("global"),
        NormalizedSum(),
        BestAndWorst(),
        CorrelationWeighted(),
        LogTamed(),
        AmongCorrect("size", threshold=0.5),
        Decorrelated(GroupRelative(), ["red"]),
    ],
    ids=repr,
)
def test_credit_that_undoes_a_bounded_reward_is_warned_of(credit: Credit, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = warnings(credit, caplog)
    assert message.startswith(f"reward 'aesthetics' saturates (Bounded), but the credit {type(credit).__name__} ")
    assert "use genalign.algorithms.credit.LeaveOneOut" in message


def test_credit_in_units_of_the_score_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(PlainReward(), caplog) == warnings(LeaveOneOut(), caplog) == []
    assert warnings(Decorrelated(PlainReward(), ["red"]), caplog) == []
    assert warnings(GroupRelative(), caplog, reward=plain) == []
    assert warnings(GroupRelative(), caplog, weight=0.0) == []  # only reported


def test_a_bounded_reward_is_seen_inside_others(caplog: pytest.LogCaptureFixture) -> None:
    assert len(warnings(GroupRelative(), caplog, Doubled(Bounded()))) == 1
    (logged,) = ScoreLog().logged([NamedReward("x", Doubled(Bounded()))])
    assert len(warnings(GroupRelative(), caplog, logged.function)) == 1


def test_credit_per_step_is_tried_with_scores_of_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    rewards = [NamedReward("aesthetics", Bounded())]
    try_credit(dense_grpo(), rewards, prompts=3, group_size=4, steps=2)
    assert "the credit RewardGain" in caplog.text
    with pytest.raises(ValueError, match="credit per step needs scores of every stored state"):
        try_credit(replace(flow_grpo(), credit=RewardGain(0.01)), rewards, prompts=3, group_size=4, steps=2)


def test_credit_for_another_range_of_scores_is_not_tried(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(BetaNormalized(low=0.0, high=0.1), caplog) == []


def test_groups_that_are_too_small_for_a_credit_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(BestOfNCredit(4), caplog) != []
    with pytest.raises(ValueError, match="needs groups of 5 or more, not of 4: lower n, or raise group_size"):
        warnings(BestOfNCredit(5), caplog)


@pytest.mark.parametrize(
    "credit",
    [EnsembleCredit(), AmongCorrect("size", threshold=0.5), Decorrelated(GroupRelative(), ["red"])],
    ids=lambda credit: type(credit).__name__,
)
def test_a_balance_is_tried_with_each_reward_alone(credit: Credit) -> None:
    rewards = [NamedReward("aesthetics", plain), NamedReward("size", plain), NamedReward("red", plain, 0.0)]
    balanced = with_gradient_balance(replace(flow_grpo(), credit=credit))
    try_credit(replace(balanced, balance=None), rewards, prompts=3, group_size=4, steps=2)
    message = (
        f"by each reward separately, which {type(credit).__name__} refuses .*: choose a credit such as GroupRelative"
    )
    with pytest.raises(ValueError, match=message):
        try_credit(balanced, rewards, prompts=3, group_size=4, steps=2)
    try_credit(with_gradient_balance(flow_grpo()), rewards, prompts=3, group_size=4, steps=2)


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (Decorrelated(GroupRelative(), ["saturation"]),
         "the credit names the reward 'saturation', but the rewards are aesthetics, size, red"),
        (Decorrelated(GroupRelative(), ["size"]), "the nuisance 'size' has weight 1"),
        (AmongCorrect("strict"), "the credit names the reward 'strict'"),
    ],
)  # fmt: skip
def test_names_of_no_reward_are_refused(credit: Credit, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=message):
        warnings(credit, caplog)


@pytest.mark.parametrize(
    "credit",
    [CorrelationWeighted(), AmongCorrect("blue", threshold=0.5), Decorrelated(GroupRelative(), ["size"])],
    ids=repr,
)
def test_a_round_is_trained_with_credit_over_several_rewards(credit: Credit, small: SD3) -> None:
    rewards = [NamedReward("red", redness), NamedReward("blue", plain), NamedReward("size", compressibility, 0.0)]
    recipe = replace(flow_grpo(window=1), credit=credit)
    settings = replace(SETTINGS, rounds=1)
    trainer = Trainer(small, Policy(small.denoiser, Lora(rank=2)), rewards, PROMPTS, recipe, settings, SAMPLING)
    (result,) = trainer.rounds()
    assert set(result.rewards) == {"red", "blue", "size"} and result.grad_norm > 0


def test_the_trial_draws_from_no_global_generator() -> None:
    before = torch.get_rng_state()
    try_credit(flow_grpo(), [NamedReward("x", Bounded())], prompts=3, group_size=4, steps=2)
    assert torch.equal(before, torch.get_rng_state())
