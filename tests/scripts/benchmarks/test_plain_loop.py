"""The loop that ours is compared with does the same first update, where it is asked to: it is no straw man."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, step_noise
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE
from genalign.scoring.score import NamedReward
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines import SD3
from scripts.benchmarks.plain_loop import PlainLoop, PlainSettings

SIGMAS = (1.0, 0.75, 0.5, 0.25)
PROMPTS = PromptSet("four", tuple(Prompt(text) for text in ("a circle", "two squares", "a square", "two circles")))


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


class _Seen:
    """Keeps the first update's gradient instead of following it."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self.parameters, self.gradients = parameters, list[Tensor]()
        self.param_groups: list[dict[str, float]] = [{}]

    def step(self) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradients.append(torch.cat([part.flatten() for part in parts]))

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _noises(start: RolloutInputs, pipeline: SD3) -> Iterator[Tensor]:
    x = pipeline.initial_noise(start.noise_seeds)
    yield x
    for step in range(len(SIGMAS) - 1):
        yield step_noise(start.step_seeds, step, x)


def test_its_first_update_equals_ours_with_the_same_switches(tiny_folder: Path) -> None:
    shape = {"prompts_per_round": 4, "group_size": 4, "batch_size": 8}
    recipe = flow_grpo(FlowSDE(0.9), clip_range=1e-4, std="global", shared_noise=False)
    ours = SD3.load(tiny_folder)
    policy = Policy(ours.denoiser, Lora(rank=4, alpha=8), seed=0)
    settings = TrainerSettings(rounds=1, updates_per_round=2, max_grad_norm=1e9, **shape)
    rewards = [NamedReward("red", redness)]
    trainer = Trainer(ours, policy, rewards, PROMPTS, recipe, settings, Sampling(4, SIGMAS))
    trainer.optimizer = _Seen(policy.parameters)
    asked = next(trainer.prompts.rounds())
    parts = trainer.sample(0, asked)
    (result,) = trainer.rounds()

    theirs = SD3.load(tiny_folder)
    parameters = Policy(theirs.denoiser, Lora(rank=4, alpha=8), seed=0).parameters
    plain = PlainSettings(SIGMAS, noise_level=0.9, max_grad_norm=1e9, **shape)
    loop = PlainLoop(theirs.pipe, parameters, redness, PROMPTS.prompts, plain)
    seen = _Seen(parameters)
    loop.optimizer = seen
    texts = [prompt.text for prompt in asked for _ in range(4)]
    starts = trainer.sampler.inputs(recipe, asked, "0/0").split(8)
    batches = [loop.sample(texts[i : i + 8], _noises(start, ours)) for i, start in zip((0, 8), starts, strict=True)]
    scores = torch.cat([loop.score(batch, [Prompt(text) for text in batch.texts]) for batch in batches])
    assert float(scores.mean()) == pytest.approx(result.reward, rel=1e-5)
    # Samples and scores agree but for rounding, which a gradient would show: both learn from the same ones.
    advantages = loop.advantages(torch.cat([part.scores[:, 0] for part in parts])).split(8)
    for part, batch, advantage in zip(parts, batches, advantages, strict=True):
        torch.testing.assert_close(batch.final, part.rollout.final, rtol=0, atol=1e-5)
        batch.states = torch.cat([part.rollout.x[:, :1], part.rollout.x_next], dim=1)
        batch.log_probs = loop.log_probs(batch)
        loop.update([batch], [advantage])
    for mine, found in zip(trainer.optimizer.gradients, seen.gradients, strict=True):
        assert mine.norm() > 0 and (mine - found).norm() <= 1e-6 * mine.norm()


def test_a_round_learns_and_a_window_trains_few_steps(tiny_folder: Path) -> None:
    pipeline = SD3.load(tiny_folder)
    parameters = Policy(pipeline.denoiser, Lora(rank=4, alpha=8), seed=0).parameters
    before = [parameter.detach().clone() for parameter in parameters]
    settings = PlainSettings(SIGMAS, prompts_per_round=4, group_size=4, batch_size=8, window=1)
    updates: list[int] = []
    loop = PlainLoop(pipeline.pipe, parameters, redness, PROMPTS.prompts, settings, lambda: updates.append(1))
    loop.round()
    assert len(updates) == 2 and any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    made = loop.sample(["a circle"] * 8)
    assert made.log_probs.shape == (8, 1) and made.states.shape[:2] == (8, 2)
