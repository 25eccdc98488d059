"""The loop that ours is compared with learns what ours learns from the same samples: it is no straw man."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, step_noise
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE
from genalign.scoring.score import NamedReward
from genalign.training.sampler import SampledBatch
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet, RewardFunction
from pipelines import SD3
from scripts.benchmarks.plain_loop import PlainLoop, PlainSettings, Trajectories, log_probability

SIGMAS = (1.0, 0.75, 0.5, 0.25)
PROMPTS = PromptSet("four", tuple(Prompt(text) for text in ("a circle", "two squares", "a square", "two circles")))
SHAPE = {"prompts_per_round": 4, "group_size": 4, "batch_size": 8}


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


class _Seen:
    """Keeps the gradients instead of following them."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self.parameters, self.gradients = parameters, list[Tensor]()
        self.param_groups: list[dict[str, float]] = [{}]

    def step(self) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradients.append(torch.cat([part.flatten() for part in parts]))

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _trainer(folder: Path, reward: RewardFunction) -> Trainer:
    """Ours, with the switches of the plain loop."""
    recipe = flow_grpo(FlowSDE(0.9), clip_range=1e-4, std="global", shared_noise=False)
    pipeline = SD3.load(folder)
    policy = Policy(pipeline.denoiser, Lora(rank=4, alpha=8), seed=0)
    settings = TrainerSettings(rounds=1, updates_per_round=2, max_grad_norm=1e9, **SHAPE)
    rewards = [NamedReward("red", reward)]
    trainer = Trainer(pipeline, policy, rewards, PROMPTS, recipe, settings, Sampling(4, SIGMAS))
    trainer.learner.optimizer = cast(Any, _Seen(policy.parameters))
    return trainer


def _loop(folder: Path, reward: RewardFunction = redness, **changes: Any) -> PlainLoop:
    pipeline = SD3.load(folder)
    parameters = Policy(pipeline.denoiser, Lora(rank=4, alpha=8), seed=0).parameters
    settings = PlainSettings(**{"sigmas": SIGMAS, "noise_level": 0.9, "max_grad_norm": 1e9, **SHAPE, **changes})
    loop = PlainLoop(pipeline.pipe, parameters, reward, PROMPTS.prompts, settings)
    loop.optimizer = cast(Any, _Seen(parameters))
    return loop


def _noises(start: RolloutInputs, pipeline: SD3) -> Iterator[Tensor]:
    x = pipeline.initial_noise(start.noise_seeds)
    yield x
    for step in range(len(SIGMAS) - 1):
        yield step_noise(start.step_seeds, step, x)


def _same_samples(loop: PlainLoop, parts: Sequence[SampledBatch], texts: Sequence[str]) -> Trajectories:
    """Ours, as the plain loop stores them, with its own log-probabilities of them."""
    states = torch.cat([torch.cat([part.rollout.x[:, :1], part.rollout.x_next], dim=1) for part in parts])
    steps = torch.arange(len(SIGMAS) - 1).expand(len(states), -1)
    samples = Trajectories(steps, states, steps.float(), *loop.encode(list(texts)))
    with torch.no_grad():
        drawn = torch.stack([loop.log_probs(samples, j) for j in range(steps.shape[1])], dim=1)
    return Trajectories(steps, states, drawn, samples.context, samples.pooled)


def test_from_the_same_noise_it_draws_the_same_samples(tiny_folder: Path) -> None:
    trainer, loop = _trainer(tiny_folder, redness), _loop(tiny_folder)
    prompts = next(trainer.prompts.rounds())
    texts = [prompt.text for prompt in prompts for _ in range(4)]
    starts, parts = trainer.sampler.inputs(trainer.recipe, prompts, "0/0").split(8), trainer.sample(0, prompts)
    for part, start, first in zip(parts, starts, (0, 8), strict=True):
        batch, final = loop.sample(texts[first : first + 8], _noises(start, cast(SD3, trainer.pipeline.pipeline)))
        torch.testing.assert_close(final, part.rollout.final, rtol=0, atol=1e-5)
        torch.testing.assert_close(batch.states[:, 1:], part.rollout.x_next, rtol=0, atol=1e-5)
        torch.testing.assert_close(redness(loop.decode(final), prompts), part.scores[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("equal", [(), (0, 2)], ids=["every sample has an advantage", "a group of each half has none"])
def test_from_the_same_samples_its_gradients_equal_ours(tiny_folder: Path, equal: tuple[int, ...]) -> None:
    reward = {"groups": list[str]()}

    def partly(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        tied = torch.tensor([prompt.text in reward["groups"] for prompt in prompts])
        return redness(samples, prompts).masked_fill(tied, 0.25)

    trainer, loop = _trainer(tiny_folder, partly), _loop(tiny_folder)
    prompts = next(trainer.prompts.rounds())
    reward["groups"] = [prompts[place].text for place in equal]
    parts = trainer.sample(0, prompts)
    list(trainer.rounds())
    samples = _same_samples(loop, parts, [prompt.text for prompt in prompts for _ in range(4)])
    advantages = loop.advantages(torch.cat([part.scores[:, 0] for part in parts]))
    rows = loop.trained_rows(advantages)
    assert len(rows) == 16 - 4 * len(equal)
    loop.learn(samples[rows], advantages[rows])
    pairs = zip(cast(_Seen, trainer.learner.optimizer).gradients, cast(_Seen, loop.optimizer).gradients, strict=True)
    for mine, found in pairs:
        assert mine.norm() > 0 and (mine - found).norm() <= 1e-6 * mine.norm()


def test_dropping_samples_changes_the_mean_and_the_halves_alone(tiny_folder: Path) -> None:
    """Of 16 samples 5 are trained and one is put back: two batches of 3, of which the second has the dropped one."""
    loop = _loop(tiny_folder)
    samples = Trajectories.joined([loop.sample([prompt.text] * 8)[0] for prompt in PROMPTS.prompts[:2]])
    advantages = torch.zeros(16, dtype=torch.float64)
    advantages[[0, 1, 2, 9, 12]] = torch.tensor([1.0, -1.0, 7.0, 2.0, -0.5], dtype=torch.float64)
    rows = loop.trained_rows(advantages)
    assert len(rows) == 6 and {0, 1, 2, 9, 12} < set(rows.tolist())
    loop.learn(samples[rows], advantages[rows])
    halves, seen = rows.split(3), cast(_Seen, loop.optimizer)
    for half, found in zip(halves, seen.gradients, strict=True):
        # on policy: minus the mean over the half and three steps of the clamped advantage times the log-probability
        values = [loop.log_probs(samples[half], j) @ advantages[half].clamp(max=5).float() for j in range(3)]
        torch.autograd.backward(-torch.stack(values).sum() / 9)
        expected = _Seen(loop.parameters)
        expected.step()
        expected.zero_grad()
        assert found.norm() > 0 and (found - expected.gradients[0]).norm() <= 1e-5 * found.norm()


@pytest.mark.parametrize(("live", "trained"), [(16, 16), (12, 12), (11, 12), (1, 2), (0, 2)])
def test_as_many_dropped_samples_are_put_back_as_make_equal_batches(tiny_folder: Path, live: int, trained: int) -> None:
    advantages = (torch.arange(16) < live).double()
    assert len(_loop(tiny_folder).trained_rows(advantages)) == trained


def test_rewards_are_computed_in_other_threads_and_texts_once(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, encoded = set[int](), list[list[str]]()

    def heard(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        threads.add(threading.get_ident())
        return redness(samples, prompts)

    loop = _loop(tiny_folder, heard)
    encode = loop.pipe.encode_prompt
    monkeypatch.setattr(
        loop.pipe, "encode_prompt", lambda texts, *rest, **named: encoded.append(texts) or encode(texts, *rest, **named)
    )
    loop.round()
    assert threading.get_ident() not in threads
    assert [len(texts) for texts in encoded] == [2, 2]  # two prompts a batch of 8, and none again to learn
    assert len(cast(_Seen, loop.optimizer).gradients) == 2


def test_a_round_learns_and_a_window_trains_few_steps(tiny_folder: Path) -> None:
    loop, updates = _loop(tiny_folder, window=1), list[int]()
    loop.optimizer = torch.optim.AdamW(loop.parameters)
    before = [parameter.detach().clone() for parameter in loop.parameters]
    loop.after_update = lambda: updates.append(1)
    loop.round()
    assert len(updates) == 2 and any(not torch.equal(a, b) for a, b in zip(before, loop.parameters, strict=True))
    windows = [loop.sample(["a circle"] * 2)[0] for _ in range(8)]
    assert {int(window.steps[0, 0]) for window in windows} == {0, 1}
    mixed = Trajectories.joined(windows)  # samples of several windows in one batch, as after samples are dropped
    torch.testing.assert_close(loop.log_probs(mixed, 0).detach(), mixed.log_probs[:, 0], rtol=0, atol=1e-5)


def test_an_odd_number_of_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="192 samples are no even number of batches of 64"):
        PlainSettings(SIGMAS, batch_size=64)


def test_the_log_probability_is_a_mean_over_dimensions() -> None:
    x, mean, std = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor(0.5)
    density = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    difference = density - log_probability(x, mean, std)
    torch.testing.assert_close(difference, difference[:1].expand(3))
