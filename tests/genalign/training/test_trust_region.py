"""The trust region: rounds move the policy by its target from any first rate, and updates that overshoot are undone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from genalign.algorithms.interfaces import MetricSums, UpdateBatch, UpdateContext
from genalign.algorithms.recipes import dragon, flow_grpo, nft, prdp
from genalign.diffusion.policy import Policy
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.training.trust_region import RateController, RoundLimit, TrustRegion, change_of_predictions
from pipelines import SD3
from tests.genalign.training.toy_runs import SETTINGS, toy_trainer, weights

RECIPES = {
    "flow_grpo": lambda: flow_grpo(window=2, clip_range=1e-2),
    "prdp": lambda: prdp(window=2, beta=1e-2, clip_range=1e-2),
    "nft": nft,
    "dragon": dragon,
}
TARGET = 1e-3


def auto(rate: float, **changes: object) -> TrainerSettings:
    region = TrustRegion(TARGET, initial_rate=rate, probe=4)
    return replace(SETTINGS, learning_rate="auto", trust_region=region, **changes)


@pytest.mark.parametrize("rate", [pytest.param(1e-4, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("name", RECIPES)
def test_rounds_move_the_policy_by_the_target_whatever_the_first_rate(tiny: SD3, name: str, rate: float) -> None:
    trainer = toy_trainer(tiny, RECIPES[name](), settings=auto(rate, rounds=8))
    results = list(trainer.rounds())
    moved = [result.metrics["policy_distance"] for result in results]
    assert all(math.isfinite(distance) and distance <= 2.5 * TARGET for distance in moved)
    assert TARGET / 6 < sum(moved[-3:]) / 3 < 2 * TARGET  # two updates of a round may point opposite ways
    assert all(tensor.isfinite().all() for tensor in weights(trainer))


class Line(nn.Module):
    """One weight at 3, after an update from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))


def overshot() -> tuple[Policy, RoundLimit]:
    policy = Policy(Line(), None)
    return policy, RoundLimit(RateController(target=0.25, rate=1.0), lambda: (weight(policy) - 1) ** 2, 1.0)


def weight(policy: Policy) -> float:
    return policy.parameters[0].item()


def test_an_update_that_overshoots_is_shortened_to_the_target() -> None:
    policy, limit = overshot()
    before = policy.snapshot()
    policy.denoiser.weight.data.fill_(3.0)  # a distance of 4
    limit.shorten(policy, before, done=1.0)
    assert weight(policy) == pytest.approx(1.5) and limit.moved == pytest.approx(0.25)
    assert limit.rates.rate == pytest.approx(0.25)
    limit.adapt_rate()
    assert limit.rates.rate == pytest.approx(0.25)


def test_half_of_the_updates_may_take_half_of_the_distance() -> None:
    policy, limit = overshot()
    before = policy.snapshot()
    policy.denoiser.weight.data.fill_(1.6)  # 0.36 is below twice the target of a round, above that of half a round
    limit.shorten(policy, before, done=1.0)
    assert weight(policy) == pytest.approx(1.6)
    limit.shorten(policy, before, done=0.5)
    assert limit.moved == pytest.approx(0.125)


def test_an_update_that_moves_too_far_at_any_length_is_taken_back() -> None:
    policy, limit = overshot()
    before = policy.snapshot()
    policy.denoiser.weight.data.fill_(3.0)
    limit.distance = lambda: 0.0 if weight(policy) == 1.0 else math.nan
    limit.shorten(policy, before, done=1.0)
    assert weight(policy) == 1.0 and limit.rates.rate == pytest.approx(1e-4)


def test_rounding_does_not_take_the_small_updates_of_a_schedules_end_back() -> None:
    policy, limit = overshot()
    rounding = 0.1 * limit.rates.target  # as bfloat16 moves predictions, however small the update is
    limit.distance = lambda: (weight(policy) - 1) ** 2 + rounding
    limit.share = 0.01
    before = policy.snapshot()
    policy.denoiser.weight.data.fill_(1.05)
    limit.shorten(policy, before, done=0.5)
    limit.adapt_rate()
    assert weight(policy) == pytest.approx(1.05) and limit.rates.rate == 1.0


@pytest.mark.parametrize(("moved", "factor"), [(0.25, 1.0), (1.0, 0.5), (1e-6, 4.0), (1e6, 0.25), (0.0, 1.0)])
def test_the_rate_follows_the_root_of_the_distance_by_at_most_four(moved: float, factor: float) -> None:
    limit = RoundLimit(RateController(0.25, 1.0), lambda: moved, 1.0, moved)
    limit.adapt_rate()
    assert limit.rates.rate == pytest.approx(factor)


def test_a_falling_schedule_shrinks_the_steps_and_not_the_rate_below_it(tiny: SD3) -> None:
    settings = auto(1e-2, rounds=6, learning_rate_schedule="linear")
    trainer = toy_trainer(tiny, flow_grpo(window=2, clip_range=1e-2), settings=settings)
    moved = [result.metrics["policy_distance"] for result in trainer.rounds()]
    assert moved[-1] < moved[2] / 4  # the distance of a round grows with the rate squared


def first_batch(trainer: Trainer) -> tuple[UpdateContext, UpdateBatch]:
    prompts = next(iter(trainer.prompts.rounds()))
    part = trainer.sample(0, prompts)[0]
    context = UpdateContext(
        trainer.pipeline,
        trainer.policy,
        trainer.grid,
        trainer.kernel,
        trainer.guidance,
        trainer.learner.old,
        MetricSums(),
    )
    count = len(part.rollout.final)
    return context, UpdateBatch(part.rollout, torch.ones(count), torch.zeros(count, dtype=torch.long), False)


def move(trainer: Trainer) -> None:
    for parameter in trainer.policy.parameters:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", RECIPES)
def test_the_distance_is_the_change_of_predictions(tiny: SD3, name: str) -> None:
    trainer = toy_trainer(tiny, RECIPES[name]())
    context, batch = first_batch(trainer)
    distance = change_of_predictions(context, batch, seed=0)
    assert distance().tolist() == [0.0] * len(batch)
    move(trainer)
    first = distance()
    move(trainer)
    assert (first > 0).all() and (distance() > first).all() and torch.equal(distance(), distance())


@pytest.mark.parametrize("name", ["target", "initial_rate", "probe"])
def test_impossible_regions_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"training\.trust_region\.{name} must be positive, not 0"):
        TrustRegion(**{name: 0})  # type: ignore[arg-type]


def test_a_region_beside_a_fixed_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no effect on a fixed learning rate: set training\.learning_rate to auto"):
        TrainerSettings(learning_rate=1e-3, trust_region=TrustRegion(target=0.1))
