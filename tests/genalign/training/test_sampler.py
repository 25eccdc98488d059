"""Overlapped scoring: a batch is scored while the next one is sampled, with the same results."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipes import dense_grpo, flow_grpo
from genalign.diffusion.rollout import rows_are_finite
from genalign.diffusion.transitions import FlowSDE
from genalign.scoring.score import NamedReward, score
from genalign.training.round_result import RoundResult
from genalign.training.sampler import features_of_finite, in_thread, score_finite
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet, RewardFunction
from pipelines import SD3
from rewards.pairwise import BradleyTerry, WinRateReward
from tests.fake_streams import FakeStreams
from tests.fake_streams import streams as streams
from tests.genalign.training.toy_runs import SETTINGS, redness, toy_trainer

PROMPTS = PromptSet("four", tuple(Prompt(text) for text in ("a circle", "two squares", "a square", "two circles")))


def brightness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


def _trainer(
    folder: Path, reward: RewardFunction, overlap_scoring: bool, make: Callable[..., Recipe] = flow_grpo
) -> Trainer:
    settings = replace(SETTINGS, prompts_per_round=4, weight_decay=1e-4, overlap_scoring=overlap_scoring)
    return toy_trainer(
        SD3.load(folder, height=32, width=32), make(FlowSDE(0.9), clip_range=1e-2), reward, settings, PROMPTS
    )


@pytest.mark.parametrize("make", [flow_grpo, dense_grpo])
def test_overlap_changes_nothing(tiny_folder: Path, make: Callable[..., Recipe]) -> None:
    def trained(overlap_scoring: bool) -> tuple[list[RoundResult], list[Tensor]]:
        trainer = _trainer(tiny_folder, redness, overlap_scoring, make)
        return [replace(result, seconds=0.0) for result in trainer.rounds()], trainer.policy.parameters

    (serial, weights), (overlapped, others) = trained(False), trained(True)
    assert overlapped == serial and list(overlapped[0].calls) == list(serial[0].calls)
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
        return predict(x, *rest)

    trainer.pipeline.predict = counted
    next(trainer.rounds())
    assert scored == [True] * 4


def test_a_sample_that_is_not_finite_meets_no_other_of_its_prompt() -> None:
    """A black image in its place would win or lose against the valid ones."""
    samples = torch.tensor([0.2, torch.nan, 0.6, 0.4]).view(4, 1, 1, 1).expand(-1, 3, 2, 2)
    prompt, alone, seen = Prompt("a"), Prompt("b"), list[Sequence[Prompt]]()

    def recorded(scored: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append(prompts)
        return redness(scored, prompts)

    rewards = [NamedReward("wins", WinRateReward(BradleyTerry(brightness, 100.0))), NamedReward("seen", recorded)]
    prompts = [prompt, prompt, prompt, alone]
    scores = score_finite(rewards, samples, prompts, rows_are_finite(samples))
    assert scores[:, 0].nan_to_num(-1).tolist() == [0.0, -1.0, 1.0, -1.0]
    assert scores[:, 1].isnan().tolist() == [False, True, False, False]
    assert len(seen) == 1 and all(a is b for a, b in zip(seen[0], [prompt, prompt, alone], strict=True))
    nothing = score_finite(rewards, samples, prompts, torch.zeros(4, dtype=torch.bool))
    assert nothing.shape == (4, 2) and bool(nothing.isnan().all()) and len(seen) == 1


def test_features_of_a_sample_that_is_not_finite_are_nan() -> None:
    """So that a credit by sets leaves it out, and no black image is part of one."""
    samples, finite = torch.rand(3, 3, 2, 2), torch.tensor([True, False, True])
    values = features_of_finite(lambda batch: batch.flatten(2).mean(2), samples, finite)
    assert values.isnan().all(1).tolist() == [False, True, False]
    assert torch.equal(values[finite], samples[finite].flatten(2).mean(2))


def test_the_thread_ends_with_a_reward_that_raises(tiny_folder: Path) -> None:
    def wrong(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="returned shape"):
        next(_trainer(tiny_folder, wrong, overlap_scoring=True).rounds())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("genalign-score")]


def test_an_interrupt_does_not_wait_for_a_reward_that_hangs() -> None:
    forever, start = threading.Event(), time.monotonic()

    def calls() -> Iterator[Callable[[], bool]]:
        yield partial(forever.wait, 20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(in_thread(calls()))
    assert time.monotonic() - start < 10
    waiting = [thread for thread in threading.enumerate() if thread.name == "genalign-score"]
    assert all(thread.daemon for thread in waiting)
    forever.set()
    for thread in waiting:
        thread.join(10)  # or it would record an event on the streams of the next test


@dataclass(frozen=True)
class Batch:
    """A batch on its way through the threads."""

    latents: Tensor
    scores: Tensor


def test_a_batch_is_scored_on_a_stream_of_its_own(streams: FakeStreams) -> None:
    """After what computed its latents, before what uses its result, and with their memory held meanwhile."""

    def scored(batch: Batch, prompts: Sequence[str]) -> list[Batch]:
        streams.log.append(f"scored on {torch.cuda.current_stream().name}")
        return [Batch(streams.tensor(2), torch.zeros(2))]

    [[result]] = in_thread([partial(scored, Batch(streams.tensor(2), torch.zeros(2)), ["a prompt"])])
    assert result.latents.is_cuda
    assert streams.log == [
        "main 1 recorded",
        "side waits for main 1",
        "memory in use by side",
        "scored on side",
        "side 1 recorded",
        "main waits for side 1",
        "memory in use by main",
    ]


def test_a_reward_with_a_timeout_is_on_the_stream_of_its_batch(streams: FakeStreams) -> None:
    """A reward with a timeout has a thread of its own within that of the batch."""

    def seen(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        streams.log.append(torch.cuda.current_stream().name)
        return torch.zeros(len(samples))

    rewards = [NamedReward("seen", seen, timeout=10.0)]
    list(in_thread([partial(score, rewards, torch.zeros(2, 3), [Prompt("")] * 2)]))
    assert "side" in streams.log and "main" not in streams.log
