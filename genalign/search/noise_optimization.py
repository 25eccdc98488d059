"""Noise optimization: gradients of differentiable rewards through all sampling steps to the noise.

P prompts, one sample of each; M noises of a sample: the initial one, and one for each stochastic step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genalign.algorithms.reward_gradient import latent_gradient
from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.diffusion.transitions import DDIM, ODE, Kernel, transition
from genalign.scoring.budget import Budget
from genalign.search.engine import Particles, ScoredParticles, SearchRun
from genalign.search.strategy import Strategy, largest_size


@dataclass(frozen=True)
class NoiseOptimization(ABC):
    """Gradient steps on the noises of a sample; the best sample of all iterations is returned.

    Attributes:
        iterations: Number of samples made; None for as many as the budget allows. The last one needs no gradient.
        learning_rate: Learning rate of the optimizer of the noises, which have unit variance.
        clip: Largest norm of the gradient of a prompt.
        initial_search: A strategy, such as ``Prune``, that finds the initial noise to start from.
        initial_share: Fraction of the budget that it may spend.
        recompute: Keep the graph of one step at a time, for one more NFE of each step (gradient checkpointing).
    """

    iterations: int | None = None
    learning_rate: float = 5.0
    clip: float = 0.1
    initial_search: Strategy | None = None
    initial_share: float = 0.5
    recompute: bool = False

    @property
    @abstractmethod
    def kernel(self) -> Kernel:
        """The rule of the moves that turn noises into a sample."""

    @abstractmethod
    def optimizer(self, noises: Tensor) -> torch.optim.Optimizer:
        """Return the optimizer of ``noises`` (P, M, ...)."""

    @abstractmethod
    def penalty(self, noises: Tensor) -> Tensor:
        """Return the loss (P,) that keeps ``noises`` (P, M, ...) close to Gaussian noise."""

    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles:
        if run.kernel not in (ODE(), self.kernel):
            raise ValueError(
                f"{type(self).__name__} moves by {self.kernel}, and not by sampling.kernel {run.kernel}: leave that"
                " out, or choose a strategy such as Prune or ZeroOrder"
            )
        if self.initial_search is None:
            initial = run.start(1).x  # the noise of a noise hypernetwork is optimized as it shifts it
        else:
            first = self.initial_search(run, budget and budget.of(budget.limit * self.initial_share))
            initial = run.shifted(first.candidates.noise[first.best()], torch.arange(len(run.prompts)))
            budget = budget and budget.remaining(run.ledger, len(run.prompts))
        alone = replace(self, initial_search=None)
        iterations = largest_size(run, budget, self.iterations, lambda n: replace(alone, iterations=n), "iterations")
        # noises of unit variance, the initial one first
        stochastic = [i for i in range(run.steps) if float(self.kernel(run.grid[i]).s) > 0]
        seeds = [[derived_seed(run.seed, p, "step", i) for p in range(len(initial))] for i in stochastic]
        unit = initial / _initial_std(run)
        noises = torch.stack([unit, *(seeded_noise(row, initial) for row in seeds)], dim=1).requires_grad_(True)
        optimizer, best = self.optimizer(noises), None
        for number in range(iterations):
            plain = number == 0 and self.initial_search is None and not stochastic
            x, candidates = self._sample(run, noises, stochastic, plain)
            samples, scores, ascent = self._scores(run, x, with_gradient=number + 1 < iterations)
            finished = run.finished(ScoredParticles(candidates, samples, scores, run.weights))
            both = finished if best is None else best.extend(finished)
            best = both.rows(both.best())
            if ascent is not None:
                loss = self.penalty(noises).sum() - (x * ascent).sum().to(noises.device)
                gradient = torch.autograd.grad(loss, noises)[0].nan_to_num(0.0, 0.0, 0.0)
                norms = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
                noises.grad = gradient * (self.clip / norms.clamp(min=self.clip))
                optimizer.step()
        assert best is not None, "there is at least one iteration"
        return best

    def _sample(self, run: SearchRun, noises: Tensor, stochastic: list[int], plain: bool) -> tuple[Tensor, Particles]:
        """Return clean latents (P, ...) with a gradient, and the same as new candidates.

        Args:
            run: The search.
            noises: All noises (P, M, ...).
            stochastic: The steps that have a noise, in the order of the noises after the first.
            plain: Whether these are the plain samples of the prompts.
        """
        prompts = list(range(len(run.prompts)))
        x = noises[:, 0] * _initial_std(run)
        candidates = run.start_from(x.detach(), prompts, [0] * len(prompts), shift=False)
        for i in range(run.steps):
            noise = noises[:, 1 + stochastic.index(i)] if i in stochastic else None
            if self.recompute:
                x = checkpoint(self._move, run, x, noise, i, use_reentrant=False)
            else:
                x = self._move(run, x, noise, i)
        latents, flags = x.detach().cpu(), torch.full_like(candidates.plain, plain)
        return x, replace(candidates, x=latents, preview=latents, plain=flags, steps_done=run.steps)

    def _scores(self, run: SearchRun, x: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decode and score clean latents (P, ...); return the rewards' gradient at them, if it is needed."""
        if with_gradient:
            ascent = latent_gradient(run.pipeline, run.rewards, x, run.prompts)
            return ascent.samples.cpu(), ascent.scores.cpu(), ascent.gradient
        with torch.no_grad():
            samples = run.pipeline.decode(x)
            columns = [reward(samples, run.prompts).float().cpu() for reward in run.rewards]
        return samples.cpu(), torch.stack(columns, dim=1), None

    def _move(self, run: SearchRun, x: Tensor, noise: Tensor | None, index: int) -> Tensor:
        step = run.grid[index]
        prediction = run.pipeline.predict(x, step, run.conditioning, run.guidance)
        move = transition(run.pipeline.path, self.kernel, x.to(prediction.device), prediction, step)
        return move.mean if noise is None else move.sample(noise.to(prediction.device))


def _initial_std(run: SearchRun) -> float:
    """Return the standard deviation of initial latents: 1, or the first sigma of a path beyond it (``EDMPath``)."""
    return max(1.0, float(run.grid.sigma[0]))


@dataclass(frozen=True)
class ReNO(NoiseOptimization):
    """Reward-based noise optimization (ReNO, arXiv 2406.04312) of the initial noise, for models of one or a few steps.

    SGD with Nesterov momentum on the reward and ``norm_weight`` times the negative log density of the noise's norm,
    |e|^2 / 2 - (d - 1) log |e|, which is least at |e|^2 = d - 1.

    Args:
        momentum: Nesterov momentum of SGD.
        norm_weight: Weight of the penalty on the norm of the noise.
    """

    momentum: float = 0.9
    norm_weight: float = 0.01

    @property
    def kernel(self) -> Kernel:
        return ODE()

    def optimizer(self, noises: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([noises], lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0)

    def penalty(self, noises: Tensor) -> Tensor:
        flat = noises.float().flatten(1)
        length = flat.norm(dim=1)
        energy: Tensor = length.square() / 2 - (flat.shape[1] - 1) * length.log()
        return self.norm_weight * energy


@dataclass(frozen=True)
class DNO(NoiseOptimization):
    """Direct noise optimization (arXiv 2405.18881): AdamW on all noises of a stochastic sampler.

    ``gamma`` weighs the log probability that Gaussian noise would have this mean and covariance, over sub-vectors of
    ``width`` values, in their order and in ``permutations`` random orders. It is flat inside the typical set. 0 leaves
    it out, as the public code does.

    Args:
        eta: Stochasticity of the DDIM sampler whose noises are optimized.
        gamma: Weight of the log probability of the noises; 0 leaves it out.
        width: Length of the sub-vectors whose mean and covariance are tested.
        permutations: Number of random orders of the values that are tested.
    """

    learning_rate: float = 0.01
    clip: float = 1.0
    eta: float = 1.0
    gamma: float = 0.0
    width: int = 16
    permutations: int = 100

    @property
    def kernel(self) -> Kernel:
        return DDIM(self.eta)

    def optimizer(self, noises: Tensor) -> torch.optim.Optimizer:
        return torch.optim.AdamW([noises], lr=self.learning_rate)

    def penalty(self, noises: Tensor) -> Tensor:
        if not self.gamma or not noises.numel():  # a run that only counts has latents without values
            return noises.new_zeros(len(noises))
        generator, size = torch.Generator().manual_seed(0), noises[0].numel()
        orders = [torch.randperm(size, generator=generator).to(noises.device) for _ in range(self.permutations)]
        losses = []
        for values in noises.flatten(1):
            shuffled = torch.stack([noise_log_probability(values[order], self.width) for order in orders])
            losses.append(-noise_log_probability(values, self.width) - shuffled.mean())
        return self.gamma * torch.stack(losses)


def noise_log_probability(values: Tensor, width: int) -> Tensor:
    """Return a bound () of the log probability that N(0, I) noise has a mean and covariance as unlikely as these.

    The noise is cut into n = len / ``width`` sub-vectors of k = ``width`` values. The bound is log 2 +
    min(-n M^2 / (2 k), -log 2) for the norm M of their mean, plus log 2 + min(-n D^2 / 2, -log 2) with
    D = (sqrt(1 + C) - 1 - sqrt(k / n))_+ for the spectral norm C of cov - I (arXiv 2405.18881, section 4).
    """
    parts = values[: len(values) // width * width].view(-1, width)
    n = len(parts)
    mean = parts.mean(0)
    covariance = parts.T @ parts / n
    deviation = torch.linalg.matrix_norm(covariance - torch.eye(width).to(covariance), ord=2)
    excess = torch.relu((1 + deviation).sqrt() - 1 - math.sqrt(width / n))
    of_mean = (-n * mean.square().sum() / (2 * width)).clamp(max=-math.log(2))
    of_covariance = (-n * excess.square() / 2).clamp(max=-math.log(2))
    return of_mean + of_covariance + 2 * math.log(2)
