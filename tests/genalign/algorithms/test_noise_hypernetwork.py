"""Noise hypernetworks: the shift of the initial noise, its gradient, and all that samples with it (fixture F13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from genalign.algorithms.interfaces import MetricSums, TermScales, UpdateBatch, UpdateContext
from genalign.algorithms.pathwise import Ascent, PathwiseObjective
from genalign.algorithms.pathwise_recipes import draft, noise_hypernetwork
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.tails import ShiftedNoise
from genalign.diffusion.hypernetwork import Hypernetwork
from genalign.diffusion.lora import ADAPTER
from genalign.diffusion.noise_shift import first_latents
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, generate, rollout
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import ODE, transition
from genalign.runtime.memory_options import Memory
from genalign.scoring.budget import NFE, backward_call
from genalign.scoring.score import NamedReward
from genalign.search.engine import SearchRun
from genalign.search.noise_optimization import ReNO
from genalign.search.noise_search import ZeroOrder
from genalign.training.dry_run import ToyPipeline, dry_run
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Conditioning, Grid, NoiseLevel, Prompt, PromptSet
from pipelines import SD3
from tests.genalign.algorithms.updates import flat_gradient

GAIN, OFFSET, CURVATURE, TARGET = 0.8, 0.5, 2.0, 1.0
BEST_SHIFT = 0.449438202247  # where the anchor is 0.25: the mean of the prior, tilted by exp(reward / 0.5)
PROMPTS = ["a circle", "two squares"]


class OneStep:
    """A generator x0 = GAIN eps + OFFSET of one step, whose adapter sees the latent and 1."""

    compute_dtype, path = torch.float64, FlowPath()

    def __init__(self) -> None:
        self.denoiser: nn.Module = nn.Sequential(nn.Linear(2, 1, bias=False, dtype=torch.float64))
        nn.init.zeros_(cast(nn.Linear, self.denoiser[0]).weight)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"none": torch.zeros(len(prompts), 1)})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        sigma = torch.tensor([1.0, 0.0], dtype=torch.float64)
        return Grid(sigma[:1], 1 - sigma, sigma)

    def level(self, u: Tensor) -> NoiseLevel:
        return NoiseLevel(u, 1 - u, u)

    def guidance_scale(self, guidance: float | None) -> float:
        return 1.0

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.tensor([[1.0 - 2.0 * (seed % 2)] for seed in seeds], dtype=torch.float64)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        output: Tensor = x - (GAIN * x + OFFSET) + self.denoiser(torch.cat([x, torch.ones_like(x)], dim=1))
        return output

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def quadratic(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return -0.5 * CURVATURE * (samples[:, 0] - TARGET).square()


@pytest.mark.parametrize("shift", [0.0, 0.2, BEST_SHIFT])
def test_the_best_constant_shift_is_the_mean_of_the_tilted_prior(shift: float) -> None:
    """Noises -1 and 1 give the expectations exactly; the adapter's matrices are (0, 1) and ``shift``."""
    pipeline = OneStep()
    policy = Policy(pipeline.denoiser, Lora(1, 1, ["0"]))
    policy.shift_noise()
    layer = cast(LoraLayer, pipeline.denoiser[0])
    a, b = (factors[ADAPTER].weight for factors in (layer.lora_A, layer.lora_B))
    a.data, b.data = (torch.tensor([row], dtype=torch.float64) for row in ([0.0, 1.0], [shift]))
    grid, inputs = pipeline.grid(1), RolloutInputs(pipeline.encode(["a"]), torch.tensor([0, 0]), (1, 2), (0, 0))
    sampled = rollout(pipeline, inputs, grid, [ODE()], 1.0)
    assert sampled.final[:, 0].tolist() == pytest.approx([GAIN * (z + shift) + OFFSET for z in (-1, 1)], abs=1e-12)
    rewards, metrics = [NamedReward("r", quadratic)], MetricSums()
    context = UpdateContext(pipeline, policy, grid, ODE(), 1.0, None, metrics, [Prompt("a")], rewards)
    batch = UpdateBatch(sampled, torch.ones(2), inputs.prompt, on_policy=True)
    objective = PathwiseObjective(ShiftedNoise(), Ascent(anchor=0.25))
    objective.backward(context, batch, TermScales.of_means(objective.terms(batch)), seed=0)
    expected = CURVATURE * GAIN * (GAIN * shift + OFFSET - TARGET) + 0.5 * shift
    assert b.grad is not None and float(b.grad) == pytest.approx(expected, abs=1e-8)
    assert (abs(expected) < 1e-9) == (shift == BEST_SHIFT)
    assert metrics.mean("kl") == pytest.approx(shift**2) and metrics.mean("endpoint_gap") == 0


def _randomized(tiny: SD3) -> Policy:
    """A policy whose adapter shifts the noise by what can be seen."""
    policy = Policy(tiny.denoiser, Lora(rank=2, alpha=4))
    for parameter in policy.parameters:
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    policy.shift_noise()
    return policy


def spread(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.diff(dim=-1).square().flatten(1).mean(1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_full_back_propagation(tiny_folder: Path, checkpointing: bool) -> None:
    tiny = SD3.load(tiny_folder, height=32, width=32, memory=Memory(checkpointing=checkpointing))
    policy, grid = _randomized(tiny), tiny.grid(2, [1.0, 0.5])
    inputs = RolloutInputs(tiny.encode(PROMPTS), torch.tensor([0, 1]), (1, 2), (3, 4))
    prompts, rewards = [Prompt(text) for text in PROMPTS], [NamedReward("r", spread)]
    context = UpdateContext(tiny, policy, grid, ODE(), 1.0, None, MetricSums(), prompts, rewards)
    batch = UpdateBatch(rollout(tiny, inputs, grid, [ODE()] * 2, 1.0), torch.ones(2), inputs.prompt, on_policy=True)
    objective = PathwiseObjective(ShiftedNoise(), Ascent(anchor=0.5))
    objective.backward(context, batch, TermScales.of_means(objective.terms(batch)), 0)
    assert context.metrics.mean("endpoint_gap") == 0
    ours = flat_gradient(context)

    tiny.denoiser.disable_gradient_checkpointing()
    noise, conditioning = tiny.initial_noise((1, 2)), inputs.conditioning[inputs.prompt]
    x = first_latents(tiny, noise, grid[0], conditioning, 1.0)
    loss = 0.5 * (x - noise).square().mean()
    for index in range(2):
        x = transition(tiny.path, ODE(), x, tiny.predict(x, grid[index], conditioning, 1.0), grid[index]).mean
    (loss - spread(tiny.decode(x), prompts).mean()).backward()
    theirs = flat_gradient(context)
    assert float(theirs.norm()) > 0 and float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_a_new_noise_hypernetwork_is_the_reference_and_a_trained_one_shifts_whatever_samples(tiny_folder: Path) -> None:
    tiny = SD3.load(tiny_folder, height=32, width=32)
    grid, sampled = tiny.grid(2, [1.0, 0.5]), list[Tensor]()
    policy = Policy(tiny.denoiser, Lora(rank=2, alpha=4))
    with policy.reference():
        (base,) = generate(tiny, PROMPTS, [1, 2], grid, 1.0, 2)
    policy.shift_noise()
    (fresh,) = generate(tiny, PROMPTS, [1, 2], grid, 1.0, 2)
    assert torch.equal(fresh, base) and all(parameter.requires_grad for parameter in policy.parameters)
    for parameter in policy.parameters:
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    rewards = [NamedReward("r", spread)]
    run = SearchRun(tiny, [Prompt(text) for text in PROMPTS], rewards, grid, 1.0, 2, "seed")
    candidates = run.start(1)
    noise = candidates.noise
    with policy.trained_prediction():
        trained = tiny.predict(noise, grid[0], run.conditioning, 1.0)
    expected = noise + (trained - tiny.predict(noise, grid[0], run.conditioning, 1.0))
    assert torch.equal(candidates.x, expected) and not torch.equal(expected, noise)
    assert run.ledger.nfe == 4  # of two samples, with and without the adapter
    sampled.append(run.finish(candidates).samples)
    for strategy in (ZeroOrder(rounds=1, neighbors=1), ReNO(iterations=1)):
        sampled.append(strategy(run.afresh(), None).samples)
    assert torch.equal(sampled[0], sampled[2])  # ReNO begins with the plain sample
    with policy.reference():
        assert torch.equal(run.afresh().start(1).x, noise)


def _trainer(folder: Path, recipe: Recipe, lora: Lora | None, **settings: object) -> Trainer:
    tiny = SD3.load(folder, height=32, width=32)
    chosen = replace(TrainerSettings(rounds=2, prompts_per_round=2, group_size=2, batch_size=4), **settings)
    prompts, sampling = PromptSet.of(PROMPTS), Sampling(2, (1.0, 0.5))
    return Trainer(tiny, Policy(tiny.denoiser, lora), [NamedReward("r", spread)], prompts, recipe, chosen, sampling)


def test_what_cannot_train_a_noise_hypernetwork_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="a noise hypernetwork is an adapter, and the whole network is trained"):
        _trainer(tiny_folder, noise_hypernetwork(), None)
    trainer = _trainer(tiny_folder, noise_hypernetwork(), Lora(rank=2))
    with pytest.raises(ValueError, match="the adapter on this model is a noise hypernetwork"):
        Trainer(
            trainer.pipeline.pipeline, trainer.policy, spread, PROMPTS, draft(), trainer.settings, Sampling(2, (1, 0.5))
        )


@pytest.mark.parametrize("kind", ["noise hypernetwork", "hypernetwork"])
def test_a_resumed_run_is_the_uninterrupted_one(tiny_folder: Path, kind: str) -> None:
    recipe, lora = noise_hypernetwork(), Lora(rank=2)
    if kind == "hypernetwork":
        recipe, lora = draft(ascent=Ascent(anchor=0.1)), Lora(rank=2, hypernetwork=Hypernetwork(width=8))
    whole, first, resumed = (_trainer(tiny_folder, recipe, lora) for _ in range(3))
    results = list(whole.rounds())
    next(first.rounds())
    resumed.restore(first.state())
    (last,) = resumed.rounds()
    assert last.reward == results[-1].reward and last.kl == results[-1].kl > 0
    for ours, theirs in zip(resumed.policy.parameters, whole.policy.parameters, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(resumed.policy.average.tensors, whole.policy.average.tensors, strict=True):
        assert torch.equal(ours, theirs)


def test_the_calls_of_a_round_are_those_of_the_documentation() -> None:
    """Sampling takes T + 2; learning 2 for the shift, T for the chain, and T again that compute it once more."""
    settings = TrainerSettings(
        rounds=1, prompts_per_round=2, group_size=2, batch_size=4, updates_per_round=1, learning_rate=1e-3
    )
    steps, rewards, prompts = 3, [NamedReward("r", spread)], PromptSet.of(PROMPTS)
    first = dry_run(ToyPipeline.flow(steps), rewards, prompts, noise_hypernetwork(), settings, 1.0).first
    assert first.nfe == 4 * (steps + 2 + 2 + steps + steps)
    assert first.counts[backward_call(NFE)] == 4 * (1 + steps)
