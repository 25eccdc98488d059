"""What a round holds: micro-batches and rollouts on the CPU change nothing, and a round ends before the next begins."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipes import flow_grpo, nft, prdp
from genalign.diffusion.transitions import FlowSDE
from genalign.runtime.distributed import ProcessGroup
from genalign.training.sampler import SampledBatch
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines import SD3
from tests.genalign.training.toy_runs import SETTINGS, adversary, redness, toy_trainer

PROMPTS = PromptSet("four", tuple(Prompt(text) for text in ("a circle", "two squares", "a square", "two circles")))
LARGE = replace(SETTINGS, prompts_per_round=4, batch_size=8, updates_per_round=1)
RECIPES = [flow_grpo(FlowSDE(0.9), window=2, clip_range=1e-2, kl=0.1), nft(), prdp(FlowSDE(0.9), window=2)]


def _trainer(folder: Path, recipe: Recipe, settings: TrainerSettings, reward: Any = redness) -> Trainer:
    return toy_trainer(SD3.load(folder), recipe, reward, settings, PROMPTS)


def _gradient(folder: Path, recipe: Recipe, settings: TrainerSettings) -> Tensor:
    """The gradient of the second update, whose weights are no longer those that B = 0 makes equal."""
    trainer, gradients = _trainer(folder, recipe, settings), list[Tensor]()
    step = trainer.learner.optimizer.step

    def recorded(*arguments: Any) -> None:
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.policy.parameters if p.grad is not None]))
        step(*arguments)

    trainer.learner.optimizer.step = recorded  # type: ignore[assignment, method-assign]  # a wrapper of itself
    assert len(list(trainer.rounds())) == 2
    return gradients[1]


@pytest.mark.parametrize("recipe", RECIPES, ids=["flow_grpo", "nft", "prdp"])
def test_the_size_of_micro_batches_changes_gradients_by_rounding_only(tiny_folder: Path, recipe: Recipe) -> None:
    settings = replace(LARGE, rounds=2)
    whole = _gradient(tiny_folder, recipe, settings)
    parts = _gradient(tiny_folder, recipe, replace(settings, micro_batch=settings.group_size))
    assert whole.norm() > 0 and float((whole - parts).norm() / whole.norm()) < 1e-3


def test_rollouts_that_wait_on_the_cpu_change_nothing(tiny_folder: Path) -> None:
    recipe, settings = RECIPES[0], replace(LARGE, rounds=2)
    expected = _gradient(tiny_folder, recipe, settings)
    assert torch.equal(expected, _gradient(tiny_folder, recipe, replace(settings, offload_rollouts=True)))


def test_a_round_is_released_before_it_is_evaluated(tiny_folder: Path) -> None:
    trainer = _trainer(tiny_folder, RECIPES[0], replace(LARGE, rounds=2))
    states: list[weakref.ref[Tensor]] = []
    sample = trainer.sample

    def watched(*arguments: Any) -> list[SampledBatch]:
        batches = sample(*arguments)
        states.extend(weakref.ref(batch.rollout.states) for batch in batches)
        return batches

    trainer.sample = watched  # type: ignore[method-assign]  # a wrapper of itself
    for _ in trainer.rounds():
        gc.collect()
        assert states and all(state() is None for state in states)


def test_samples_are_held_for_rewards_that_are_trained_alone(tiny_folder: Path) -> None:
    trained = adversary((3, 32, 32), batch_size=6)
    for reward, held in ((redness, False), (trained, True)):
        trainer = _trainer(tiny_folder, RECIPES[0], LARGE, reward)
        batches = trainer.sample(0, next(trainer.prompts.rounds()))
        assert all((batch.samples is not None) is held for batch in batches)


class _Gathering(ProcessGroup):
    """One of several ranks, whose ``all_gather`` returns what the ranks gave before."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        GIVEN[self.rank] = tensor
        return torch.stack([GIVEN.get(rank, torch.zeros_like(tensor)) for rank in range(self.world_size)])


GIVEN: dict[int, Tensor] = {}


@pytest.mark.parametrize("sizes", [(3, 2, 3, 2, 2, 3), (1, 1, 1, 1, 1, 0), (4, 4, 4)])
def test_batches_of_unequal_sizes_are_joined_in_their_order(sizes: tuple[int, ...]) -> None:
    rows, world_size = torch.arange(2 * sum(sizes)).view(-1, 2), 3
    batches = torch.split(rows, list(sizes))
    GIVEN.clear()
    for _ in range(2):  # in the second turn every rank sees what all of them gave
        for rank in range(world_size):
            group = _Gathering(rank, world_size)
            own = [batches[number] for number in group.indices(len(sizes)) if sizes[number]]
            joined = group.interleaved(own, sizes)
    assert torch.equal(joined, rows)
