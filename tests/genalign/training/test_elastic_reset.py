"""Elastic Reset: its averages worked by hand, and what else follows the reset weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from genalign.algorithms.recipe import ElasticReset
from genalign.algorithms.recipe_changes import with_elastic_reset
from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.policy import Policy, WeightSnapshot
from genalign.training.elastic_reset import ResetWeights
from genalign.training.trust_region import TrustRegion
from pipelines import SD3
from tests.genalign.training.toy_runs import SETTINGS, toy_trainer, weights


def _policy() -> Policy:
    """A policy of one weight that starts at 0."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    return Policy(network, lora=None)


def test_weights_and_average_are_those_worked_by_hand() -> None:
    policy = _policy()
    reset, weight = ResetWeights(ElasticReset(every=4, decay=0.5), policy), policy.parameters[0]
    seen = []
    for index in range(8):  # rounds of one update, which adds 1
        with torch.no_grad():
            weight.add_(1.0)
        reset.after_update()
        reset.after_round(index, None)
        seen.append((weight.item(), float(reset.average.tensors[0])))
    expected = [(1, 0.5), (2, 1.25), (3, 2.125), (3.0625, 0), (4.0625, 2.03125), (5.0625, 3.546875)]
    assert seen == [*expected, (6.0625, 4.8046875), (5.93359375, 0)]


def test_what_is_saved_and_what_samples_follow_the_reset() -> None:
    policy = _policy()
    old, reset = WeightSnapshot(policy.parameters), ResetWeights(ElasticReset(every=1, decay=0.25), policy)
    with torch.no_grad():
        policy.parameters[0].fill_(8.0)
    policy.average.update()
    reset.after_update()
    reset.after_round(0, old)
    assert [copy[0].item() for copy in (policy.parameters, policy.average.tensors, old.tensors)] == [6.0] * 3
    assert float(reset.first.tensors[0]) == float(reset.average.tensors[0]) == 0.0


def test_without_a_due_reset_and_without_decay_nothing_changes(tiny_folder: Path) -> None:
    recipe = flow_grpo(window=1)
    ends = []
    for own in (recipe, with_elastic_reset(recipe, every=3), with_elastic_reset(recipe, every=1, decay=0.0)):
        trainer = toy_trainer(SD3.load(tiny_folder), own, settings=replace(SETTINGS, updates_per_round=1))
        list(trainer.rounds())
        ends.append(weights(trainer))
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_a_trust_region_measures_from_the_weights_of_the_reset(tiny: SD3) -> None:
    region = TrustRegion(target=1e-4, initial_rate=0.01, probe=4)
    settings = replace(SETTINGS, rounds=3, learning_rate="auto", trust_region=region)
    trainer = toy_trainer(tiny, with_elastic_reset(flow_grpo(window=1), every=1), settings=settings)
    rates = []
    for result in trainer.rounds():
        assert 0 < result.metrics["policy_distance"] <= 2e-4 and result.log_ratio_max == 0.0
        assert trainer.learner.rates is not None
        rates.append(trainer.learner.rates.rate)
    assert all(rate > 0 for rate in rates)


def test_impossible_resets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every of at least 1 and a decay in \[0, 1\)"):
        with_elastic_reset(flow_grpo(), decay=1.0)
