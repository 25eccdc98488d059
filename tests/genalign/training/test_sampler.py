"""Rounds of samples: scored while the next batch is made, to the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipes import Recipe, dense_grpo, flow_grpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE
from genalign.scoring.score import NamedReward
from genalign.training.sampler import in_thread
from genalign.training.trainer import RoundResult, Trainer, TrainerSettings
from genalign.types import Prompt, PromptSet
from pipelines import SD3

SETTINGS = TrainerSettings(
    rounds=2, prompts_per_round=4, group_size=4, batch_size=4, updates_per_round=2, learning_rate=1e-2
)
PROMPTS = PromptSet("four", tuple(Prompt(text) for text in ("a circle", "two squares", "a square", "two circles")))


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


def _trainer(
    folder: Path, reward: Callable[..., Tensor], overlap_scoring: bool, recipe: Recipe | None = None
) -> Trainer:
    tiny = SD3.load(folder)
    policy = Policy(tiny.denoiser, Lora(rank=4, alpha=8), seed=0)
    sampling = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25))
    settings = replace(SETTINGS, overlap_scoring=overlap_scoring)
    recipe = recipe or flow_grpo(FlowSDE(0.9), clip_range=1e-2)
    return Trainer(tiny, policy, [NamedReward("red", reward)], PROMPTS, recipe, settings, sampling)


@pytest.mark.parametrize("make", [flow_grpo, dense_grpo])
def test_overlap_changes_nothing(tiny_folder: Path, make: Callable[..., Recipe]) -> None:
    def trained(overlap_scoring: bool) -> tuple[list[RoundResult], list[Tensor]]:
        trainer = _trainer(tiny_folder, redness, overlap_scoring, make(FlowSDE(0.9), clip_range=1e-2))
        return [replace(result, seconds=0.0) for result in trainer.rounds()], trainer.policy.parameters

    (apart, weights), (aside, others) = trained(False), trained(True)
    assert aside == apart and list(aside[0].calls) == list(apart[0].calls)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_a_batch_is_scored_while_the_next_is_sampled(tiny_folder: Path) -> None:
    sampled_next, scored = threading.Event(), []

    def patient(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scored.append(sampled_next.wait(60))
        return redness(samples, prompts)

    trainer = _trainer(tiny_folder, patient, overlap_scoring=True)
    predict = trainer.pipeline.predict
    calls: list[int] = []

    def counted(x: Tensor, *rest: object) -> Tensor:
        calls.append(len(x))
        if sum(calls) > 4 * 4:  # more than the four steps of a batch of four
            sampled_next.set()
        return predict(x, *rest)  # type: ignore[arg-type]

    trainer.pipeline.predict = counted  # type: ignore[method-assign]
    next(trainer.rounds())
    assert scored == [True] * 4


def test_the_thread_ends_with_a_reward_that_raises(tiny_folder: Path) -> None:
    def wrong(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="returned shape"):
        next(_trainer(tiny_folder, wrong, overlap_scoring=True).rounds())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("genalign-score")]


def test_calls_run_in_order_and_one_ahead() -> None:
    seen: list[str] = []

    def calls() -> Iterator[Callable[[], int]]:
        for number in range(3):
            seen.append(f"prepared {number}")
            yield lambda number=number: number  # type: ignore[misc]  # a default that binds

    for number in in_thread(calls()):
        seen.append(f"got {number}")
    assert seen == ["prepared 0", "prepared 1", "got 0", "prepared 2", "got 1", "got 2"]
    assert list(in_thread(iter(()))) == []
