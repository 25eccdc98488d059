"""The tails of the pathwise family: where the sampler carries a gradient into the weights.

T is the number of sampling steps, N that of the samples to train. The moves of a tail are those of the rollout: the
kernel at stored steps, with the same noise, and that of the sampling settings elsewhere. Where several calls of the
network carry a gradient, each is recomputed in the backward pass, so memory holds the latents of all of them but the
graph of only one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genalign.algorithms.interfaces import UpdateBatch, UpdateContext
from genalign.algorithms.pathwise import Endpoints, Prediction
from genalign.diffusion.noise import derived_seed, seeded_noise, seeded_uniform
from genalign.diffusion.noise_shift import add_shift
from genalign.diffusion.paths import expand
from genalign.diffusion.rollout import step_noise
from genalign.diffusion.transitions import ODE, Kernel, transition
from genalign.types import Conditioning, Grid, NoiseLevel, NoiseStep

_LEAST_ALPHA = 0.01  # by which Direct-Align divides


@dataclass(frozen=True)
class Mover:
    """The moves of N samples of a batch.

    Attributes:
        context: The model and the sampler.
        batch: The batch.
        rows: The samples, on the CPU.
        conditioning: Their conditioning.
        grid: The grid of the moves.
        kernel: The kernel at stored steps.
        elsewhere: The kernel at the others.
    """

    context: UpdateContext
    batch: UpdateBatch
    rows: Tensor
    conditioning: Conditioning
    grid: Grid
    kernel: Kernel
    elsewhere: Kernel

    @classmethod
    def of(cls, context: UpdateContext, batch: UpdateBatch, rows: Tensor) -> Mover:
        """Select the samples ``rows`` (N,), to be moved as they were sampled."""
        inputs = batch.rollout.inputs
        conditioning = inputs.conditioning[inputs.prompt[rows]]
        return cls(context, batch, rows, conditioning, context.grid, context.kernel, context.elsewhere)

    @property
    def on_device(self) -> Tensor:
        """The samples, on the device of their latents."""
        return self.rows.to(self.batch.rollout.final.device, non_blocking=True)

    def seeds(self, seed: int, name: str) -> list[int]:
        """Derive a seed (N) for each sample, whatever micro-batch it is in."""
        own = self.batch.rollout.inputs.noise_seeds
        return [derived_seed(seed, name, own[row]) for row in self.rows.tolist()]

    def state(self, step: int) -> Tensor:
        """The stored latents (N, ...) before a step."""
        return self.batch.rollout.states[self.on_device, self.batch.rollout.levels.index(step)]

    def predict(self, x: Tensor, level: NoiseLevel, recompute: bool = False) -> Prediction:
        """Call the network for latents (N, ...) at a level, with the run's guidance.

        With ``recompute`` it is called again in the backward pass, and memory holds only its input until then.
        """

        def run(x: Tensor) -> Tensor:
            return self.context.pipeline.predict(x, level, self.conditioning, self.context.guidance)

        output = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        return Prediction(x, level, self.conditioning, output)

    def move(self, x: Tensor, index: int, recompute: bool = False) -> tuple[Tensor, Prediction]:
        """Move latents (N, ...) by a step of the grid; return them and the prediction, both with a gradient."""
        step = self.grid[index]
        kernel = self.kernel if index in self.batch.rollout.steps else self.elsewhere
        noise = None
        if bool((kernel(step).s > 0).all()):
            seeds = self.batch.rollout.inputs.step_seeds
            noise = step_noise([seeds[row] for row in self.rows.tolist()], index, x)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            output = self.predict(x, step).output
            move = transition(self.context.pipeline.path, kernel, x, output, step)
            return move.mean if noise is None else move.sample(noise), output

        x_next, output = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        return x_next, Prediction(x, step, self.conditioning, output)

    def compare(self, x0: Tensor) -> None:
        """Log the largest distance (N,) of clean latents from the samples: 0 where a tail repeats the rollout."""
        if self.batch.on_policy:
            gap = (x0.detach() - self.batch.rollout.final[self.on_device]).abs().flatten(1).amax(1)
            self.context.metrics.add("endpoint_gap", gap)

    def ends(self, x0: Tensor, predictions: Sequence[Prediction], weights: Tensor | None = None) -> Endpoints:
        """Wrap clean latents (N, ...), one for each sample."""
        weights = torch.ones(len(self.rows), dtype=torch.float64) if weights is None else weights
        return Endpoints(x0, self.rows, weights, predictions)


@dataclass(frozen=True)
class Chain:
    """The moves from the first stored step to the clean latent (DRaFT-K, arXiv 2309.17400; AlignProp, 2310.03739)."""

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        mover, first = Mover.of(context, batch, rows), batch.rollout.steps[0]
        x, predictions = mover.state(first), list[Prediction]()
        for index in range(first, len(context.grid)):
            x, prediction = mover.move(x, index, recompute=len(context.grid) - first > 1)
            predictions.append(prediction)
        mover.compare(x)
        yield mover.ends(x, predictions)


@dataclass(frozen=True)
class OneStepEstimate:
    """The clean latent that one prediction implies, at a random stored step of each sample (ReFL, 2304.05977).

    The published code draws one step for a whole batch, which has the same mean but more variance.
    """

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        steps, seeds = batch.rollout.steps, Mover.of(context, batch, rows).seeds(seed, "step")
        drawn = torch.tensor([steps[seed % len(steps)] for seed in seeds])
        for index in sorted(set(drawn.tolist())):
            mover = Mover.of(context, batch, rows[drawn == index])
            prediction = mover.predict(mover.state(index), context.grid[index])
            x0 = context.pipeline.path.x0(prediction.x, prediction.output, context.grid[index])
            yield mover.ends(x0, [prediction])


@dataclass(frozen=True)
class RenoisedCopies:
    """The last move, and that move from copies of the sample that are noised again to its level (DRaFT-LV, 2309.17400).

    The mean over the moves has less variance than only the last move, without further sampling. The copies start from
    the path's marginal around the sample and not from the sampler's latents, which is a small bias.

    Args:
        copies: The number of noised copies of each sample.
    """

    copies: int = 2

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"copies must be at least 1, not {self.copies}; without any, choose draft(steps=1)")

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        mover, last = Mover.of(context, batch, rows), len(context.grid) - 1
        weights = torch.full((len(rows),), 1 / (1 + self.copies), dtype=torch.float64)
        final, level = batch.rollout.final[mover.on_device], context.grid[last]
        for copy in range(1 + self.copies):
            x = mover.state(last)
            if copy:
                noise = seeded_noise(mover.seeds(seed, f"copy {copy}"), final)
                x = context.pipeline.path.add_noise(final, noise, level)
            x0, prediction = mover.move(x, last)
            yield mover.ends(x0, [prediction], weights)


@dataclass(frozen=True)
class SparseSteps:
    """Some steps of the whole chain, each with detached inputs: no gradient flows from step to step.

    A move is linear in the latents and the prediction, x' = p x + q prediction, so a prediction at step i enters
    the sample with the weight q_i times the product of the later p. The endpoint equals the sample, and only the active
    steps are computed again (FlowBP-sparse, arXiv 2606.11075; DRTune). Every step must be stored.

    Args:
        active: The number of steps that carry a gradient, drawn for each batch; at most all.
        late_bias: Steps are drawn with weights (i + 1) ** late_bias, without replacement.
        rescale: How far the active steps are scaled up to stand in for the others: 1 restores the sum of all weights, 0
            keeps their own.
        even: Whether steps are equally spaced, as in DRTune, instead of drawn.
        early_stop: The fraction of the steps, at the end, of which one is drawn as the last: the clean latent that its
            prediction implies is the endpoint. 0 takes the sample itself.
    """

    active: int = 4
    late_bias: float = 1.0
    rescale: float = 0.5
    even: bool = False
    early_stop: float = 0.0

    def __post_init__(self) -> None:
        if self.active < 1:
            raise ValueError(f"active must be at least 1 step, not {self.active}")
        if not 0 <= self.early_stop <= 1 or not 0 <= self.rescale <= 1:
            raise ValueError(f"early_stop and rescale are fractions in [0, 1], not {self.early_stop}, {self.rescale}")

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        mover, total = Mover.of(context, batch, rows), len(context.grid)
        stop = total - 1
        if self.early_stop:
            stop -= derived_seed(seed, "stop") % max(1, math.ceil(self.early_stop * total))
        weights = self._weights(context, stop)
        steps = self._active_steps(stop + 1, seed)
        left_out = float(weights.abs().sum() / weights[steps].abs().sum())
        factor = 1 + self.rescale * (left_out - 1)
        stored, place = batch.rollout.prediction[mover.on_device], batch.rollout.steps.index(stop)
        x0 = batch.rollout.final[mover.on_device]
        if stop < total - 1:
            x0 = context.pipeline.path.x0(mover.state(stop), stored[:, place], context.grid[stop])
        predictions = list[Prediction]()
        for index in steps:
            prediction = mover.predict(mover.state(index), context.grid[index], recompute=len(steps) > 1)
            x0 = x0 + factor * float(weights[index]) * (prediction.output - prediction.output.detach())
            predictions.append(prediction)
        yield mover.ends(x0, predictions)

    def _active_steps(self, total: int, seed: int) -> list[int]:
        """Choose the steps that carry a gradient, ascending."""
        count = min(self.active, total)
        if self.even:
            return sorted({total - 1 - i * total // count for i in range(count)})
        generator = torch.Generator().manual_seed(derived_seed(seed, "active"))
        weights = torch.arange(1, total + 1, dtype=torch.float64) ** self.late_bias
        return sorted(torch.multinomial(weights, count, generator=generator).tolist())

    @staticmethod
    def _weights(context: UpdateContext, stop: int) -> Tensor:
        """The weights (stop + 1,) of the predictions in the endpoint, read off the moves of ones and zeros."""
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        path, slopes, carries = context.pipeline.path, list[float](), list[float]()
        for index in range(stop + 1):
            step, last = context.grid[index], index == stop and stop < len(context.grid) - 1
            if last:
                carry, slope = path.x0(one, zero, step), path.x0(zero, one, step)
            else:
                carry, slope = (
                    transition(path, context.kernel, *pair, step).mean for pair in ((one, zero), (zero, one))
                )
            carries.append(float(carry))
            slopes.append(float(slope))
        later = [math.prod(carries[i + 1 :]) for i in range(stop + 1)]
        return torch.tensor([slope * rest for slope, rest in zip(slopes, later, strict=True)], dtype=torch.float64)


@dataclass(frozen=True)
class RenoisedEstimate:
    """The clean latent that one prediction implies, from the sample noised to a random level.

    It is what a few-step student makes in one step. No stored state is needed, so samples on disk work, too.

    Args:
        low: The lowest level, as a fraction of the path's range.
        high: The highest level.
    """

    low: float = 0.02
    high: float = 0.98

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        mover, path = Mover.of(context, batch, rows), context.pipeline.path
        place = seeded_uniform(mover.seeds(seed, "level"))
        level = context.pipeline.level(self.low + (self.high - self.low) * place)
        final = batch.rollout.final[mover.on_device]
        x = path.add_noise(final, seeded_noise(mover.seeds(seed, "noise"), final), level)
        prediction = mover.predict(x, level)
        yield mover.ends(path.x0(x, prediction.output, level), [prediction])


@dataclass(frozen=True)
class DirectAlign:
    """One move of the sample after adding known noise, and then the clean latent that it implies.

    It is the idea of Direct-Align (SRPO, arXiv 2509.06942): since the noise is known, an exact prediction recovers the
    sample from any level, so early levels can be trained. Levels are fractions of the path's range, and the noise is
    the sample's own initial noise.

    Args:
        low: The lowest level from which a sample moves.
        high: The highest level.
        gap: The size of the move, in levels.
        inversion: The fraction of samples that move up by ``gap`` instead of down, and away from the direction.
    """

    low: float = 0.2
    high: float = 0.95
    gap: float = 0.1
    inversion: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.gap < self.low < self.high < 1 or self.high + self.gap * (self.inversion > 0) >= 1:
            raise ValueError(
                "levels must be 0 < gap < low < high < 1, and with an inversion high + gap < 1, not"
                f" {self.gap}, {self.low}, {self.high}"
            )
        if not 0 <= self.inversion <= 1:
            raise ValueError(f"inversion is a fraction in [0, 1], not {self.inversion}")

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        pipeline, mover = context.pipeline, Mover.of(context, batch, rows)
        place, up = seeded_uniform(mover.seeds(seed, "level")), seeded_uniform(mover.seeds(seed, "up")) < self.inversion
        start = self.low + (self.high - self.low) * place
        first, last = pipeline.level(start), pipeline.level(torch.where(up, start + self.gap, start - self.gap))
        index = torch.zeros_like(rows)
        step = NoiseStep(first.timestep, first.alpha, first.sigma, index, last.alpha, last.sigma)
        x0, seeds = batch.rollout.final[mover.on_device], batch.rollout.inputs.noise_seeds
        eps = seeded_noise([seeds[row] for row in rows.tolist()], x0)  # that of the sample, as it was first drawn
        if (least := float(last.alpha.min())) < _LEAST_ALPHA:
            raise ValueError(
                f"Direct-Align divides by alpha, which is {least:.2g} at the noisiest level that a sample moves to:"
                f" lower high, which is {self.high}, until alpha is at least {_LEAST_ALPHA} there"
            )
        prediction = mover.predict(pipeline.path.add_noise(x0, eps, step), step)
        moved = transition(pipeline.path, ODE(), prediction.x, prediction.output, step).mean
        implied = (moved - expand(last.sigma, moved) * eps) / expand(last.alpha, moved)
        yield mover.ends(implied, [prediction], torch.where(up, -1.0, 1.0).double())


@dataclass(frozen=True)
class PartialChain:
    """The sample, noised and denoised again, as in editing; the last moves carry a gradient.

    InstructVideo (arXiv 2312.12490) trains this way on given samples: sampling from pure noise is not needed.

    Args:
        strength: The level to which a sample is noised, sigma / (alpha + sigma).
        last: The number of moves with a gradient.
        moves: The number of steps of the whole grid, of which only those below ``strength`` run.
    """

    strength: float = 0.6
    last: int = 1
    moves: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.strength < 1 or self.last < 1 or self.moves < 2:
            raise ValueError(
                f"strength must lie in (0, 1), last be at least 1 and moves at least 2, not {self.strength},"
                f" {self.last} and {self.moves}"
            )

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        grid = context.pipeline.grid(self.moves)
        first = next(i for i in range(len(grid)) if float(grid.noise_share[i]) <= self.strength or i + 1 == len(grid))
        mover = replace(Mover.of(context, batch, rows), grid=grid, kernel=ODE(), elsewhere=ODE())
        final = batch.rollout.final[mover.on_device]
        x = context.pipeline.path.add_noise(final, seeded_noise(mover.seeds(seed, "edit"), final), grid[first])
        predictions, graph = list[Prediction](), max(first, len(grid) - self.last)
        for index in range(first, len(grid)):
            with torch.set_grad_enabled(index >= graph):
                x, prediction = mover.move(x, index, recompute=index >= graph and len(grid) - graph > 1)
            predictions += [prediction] if index >= graph else []
        yield mover.ends(x, predictions)


@dataclass(frozen=True)
class ShiftedNoise:
    """The whole chain under the reference policy, from initial noise that the policy shifts (arXiv 2508.09968).

    The anchor is the weight of the mean square of the shift. The gradient at the shift is taken first, with the adapter
    off, and then that of the weights, with the adapter on, so each recomputation runs in the mode of its forward pass.
    """

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        mover, seeds, level = Mover.of(context, batch, rows), batch.rollout.inputs.noise_seeds, context.grid[0]
        noise = context.pipeline.initial_noise([seeds[row] for row in rows.tolist()])
        with torch.no_grad():
            reference = mover.predict(noise, level).output
        with context.policy.trained_prediction():
            trained = mover.predict(noise, level).output
        output = trained.detach().requires_grad_()
        x = add_shift(noise, output, reference, level)
        for index in range(len(context.grid)):
            x, _ = mover.move(x, index, recompute=len(context.grid) > 1)
        mover.compare(x)
        yield mover.ends(x, [Prediction(noise, level, mover.conditioning, output, reference)])
        with context.policy.trained_prediction():
            torch.autograd.backward(trained, output.grad)
