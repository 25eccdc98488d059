"""Sampling: trajectories with stored transitions, their replay under the current weights, and plain generation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genalign.diffusion.noise import seeded_noise
from genalign.diffusion.noise_shift import first_latents
from genalign.diffusion.transitions import ODE, Kernel, Transition, transition
from genalign.types import Conditioning, Grid, NoiseStep, Pipeline, users_of

_MIX = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: neighboring seeds land far apart


@dataclass(frozen=True)
class RolloutInputs:
    """The conditioning and the seeds of B trajectories.

    Attributes:
        conditioning: The text conditioning of the prompts.
        prompt: The row (B,) long of ``conditioning`` of each sample.
        noise_seeds: The seeds (B) of the initial latents.
        step_seeds: The seeds (B) of the noise of stochastic steps.
    """

    conditioning: Conditioning
    prompt: Tensor
    noise_seeds: tuple[int, ...]
    step_seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.prompt), len(self.noise_seeds), len(self.step_seeds)}
        if len(sizes) != 1:
            raise ValueError(f"prompt, noise_seeds and step_seeds must have one entry per sample, got {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.prompt)

    def to(self, device: torch.device) -> RolloutInputs:
        """Move the conditioning of these samples' prompts, without that of others, to ``device``."""
        used, row = torch.unique(self.prompt, return_inverse=True)
        return replace(self, conditioning=self.conditioning[used].to(device), prompt=row)

    def split(self, sizes: int | Sequence[int]) -> list[RolloutInputs]:
        """Split into consecutive parts of ``sizes`` samples, or of at most as many."""
        parts = torch.split(torch.arange(len(self)), sizes if isinstance(sizes, int) else list(sizes))
        bounds = [0, *itertools.accumulate(map(len, parts))]
        return [self.part(slice(first, end)) for first, end in itertools.pairwise(bounds)]

    def part(self, rows: slice) -> RolloutInputs:
        """Return consecutive ones of the samples, with all of the conditioning."""
        return RolloutInputs(self.conditioning, self.prompt[rows], self.noise_seeds[rows], self.step_seeds[rows])

    def select(self, rows: Tensor) -> RolloutInputs:
        """Return the samples ``rows`` (N,), with all of the conditioning."""
        seeds = [tuple(seeds[row] for row in rows.tolist()) for seeds in (self.noise_seeds, self.step_seeds)]
        return RolloutInputs(self.conditioning, self.prompt[rows], *seeds)

    def with_rows(self, rows: Tensor, other: RolloutInputs) -> RolloutInputs:
        """Replace the samples ``rows`` (N,) by those of ``other``, whose conditioning begins with that of this one."""
        noise, step = dict(enumerate(self.noise_seeds)), dict(enumerate(self.step_seeds))
        noise |= dict(zip(rows.tolist(), other.noise_seeds, strict=True))
        step |= dict(zip(rows.tolist(), other.step_seeds, strict=True))
        prompt = self.prompt.index_copy(0, rows, other.prompt)
        return RolloutInputs(other.conditioning, prompt, tuple(noise.values()), tuple(step.values()))


@dataclass(frozen=True)
class Rollout:
    """B trajectories with S stored transitions each, for training; all tensors are float32.

    A state between two stored steps is stored once, and the means of the transitions are computed again when they are
    replayed: a trajectory takes 2 S + 2 latents where the S steps are consecutive.

    Attributes:
        inputs: The conditioning and the seeds.
        steps: The grid indices (S) of the stored steps, ascending.
        states: States (B, L, ...) before and after the stored steps, at the grid indices ``levels``.
        prediction: Network outputs (B, S, ...) under the sampling policy.
        final: Clean latents (B, ...), at sigma = 0.
    """

    inputs: RolloutInputs
    steps: tuple[int, ...]
    states: Tensor
    prediction: Tensor
    final: Tensor

    @classmethod
    def joined(cls, inputs: RolloutInputs, parts: Sequence[Rollout]) -> Rollout:
        """Join parts of ``inputs`` that were sampled one after the other."""
        if len(parts) == 1:
            return parts[0]
        tensors = zip(*(part.tensors().values() for part in parts), strict=True)
        return cls(inputs, parts[0].steps, *map(torch.cat, tensors))

    @property
    def levels(self) -> tuple[int, ...]:
        """The grid indices (L) of the stored states, ascending."""
        return tuple(sorted({*self.steps, *(step + 1 for step in self.steps)}))

    @property
    def before(self) -> Tensor:
        """The index (S,) long in ``states`` of the state before each stored step; the state after it is the next."""
        levels = self.levels
        return torch.tensor([levels.index(step) for step in self.steps], dtype=torch.long)

    @property
    def x(self) -> Tensor:
        """A copy of the states (B, S, ...) before the stored steps."""
        return self.states[:, self.before]

    @property
    def x_next(self) -> Tensor:
        """A copy of the states (B, S, ...) after the stored steps."""
        return self.states[:, self.before + 1]

    def split(self, size: int) -> Iterator[Rollout]:
        """Split into consecutive parts of at most ``size`` samples."""
        for place, inputs in enumerate(self.inputs.split(size)):
            rows = slice(place * size, place * size + len(inputs))
            yield Rollout(inputs, self.steps, *(tensor[rows] for tensor in self.tensors().values()))

    def select(self, rows: Tensor) -> Rollout:
        """Copy the samples ``rows`` (N,)."""
        selected = self._map(lambda tensor: tensor[rows.to(tensor.device, non_blocking=True)])
        return replace(selected, inputs=self.inputs.select(rows))

    def with_rows(self, rows: Tensor, other: Rollout) -> Rollout:
        """Replace the samples ``rows`` (N,) by those of ``other``, as in ``RolloutInputs.with_rows``."""
        drawn = other.tensors()
        merged = [tensor.index_copy(0, rows.to(tensor.device), drawn[name]) for name, tensor in self.tensors().items()]
        return Rollout(self.inputs.with_rows(rows, other.inputs), self.steps, *merged)

    def zero_rows(self, rows: Tensor) -> Rollout:
        """Zero the tensors of the samples ``rows`` (B,) bool: NaN times a credit of 0 would be a gradient of NaN."""
        index = rows.nonzero()[:, 0]
        return self._map(lambda tensor: tensor.clone().index_fill_(0, index, 0))

    def to(self, device: torch.device) -> Rollout:
        """Move the tensors and the conditioning to ``device``, from pinned memory without waiting for it."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, inputs=self.inputs.to(device))

    def on_cpu(self) -> Rollout:
        """Copy the tensors to the CPU, into pinned memory if there is a CUDA device."""
        pin = torch.cuda.is_available()
        return self._map(lambda tensor: tensor.cpu().pin_memory() if pin else tensor.cpu())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Rollout:
        return Rollout(self.inputs, self.steps, *(change(tensor) for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, with one row per sample each, by the names of their fields."""
        return {"states": self.states, "prediction": self.prediction, "final": self.final}


def rows_are_finite(tensor: Tensor) -> Tensor:
    """Mask (B,) bool of the rows of a tensor (B, ...) that are finite throughout."""
    return tensor.isfinite().flatten(1).all(1)


@dataclass(frozen=True)
class ReplayedStep:
    """N stored transitions under the current weights (``new``) and under the sampling weights (``old``)."""

    new: Transition
    old: Transition
    x_next: Tensor
    prediction: Tensor
    step: NoiseStep

    @property
    def log_ratio(self) -> Tensor:
        """Log p_new(x_next | x) - log p_old(x_next | x), (N,), a mean over dimensions."""
        return self.new.log_ratio(self.old, self.x_next)


def kernel_per_step(
    kernel: Kernel,
    steps: Sequence[int],
    total: int,
    elsewhere: Kernel = ODE(),  # noqa: B008  # frozen
) -> tuple[Kernel, ...]:
    """Use ``kernel`` at ``steps`` and another one ``elsewhere``, on a grid of ``total`` steps."""
    return tuple(kernel if i in steps else elsewhere for i in range(total))


@torch.no_grad()
def rollout(
    pipeline: Pipeline,
    inputs: RolloutInputs,
    grid: Grid,
    kernels: Sequence[Kernel],
    guidance: float,
    store: Sequence[int] = (),
) -> Rollout:
    """Sample B trajectories and store the transitions to be trained.

    Samples of a prompt that share their initial noise are equal until the first stochastic step, and are computed only
    once until there.

    Args:
        pipeline: The model.
        inputs: Conditioning and seeds of the B samples.
        grid: The sampling grid, T steps.
        kernels: One kernel per step of the grid.
        guidance: The classifier-free guidance scale; 1 is none.
        store: The grid indices of the steps to store, S of them.
    """
    if len(kernels) != len(grid):
        raise ValueError(f"one kernel per step: the grid has {len(grid)} steps, got {len(kernels)} kernels")
    # Distinct initial latents, and the step at which equal samples part
    stochastic = [bool(kernel(grid[i]).s > 0) for i, kernel in enumerate(kernels)]
    branch = [*stochastic, True].index(True)
    rows, origin = unique_starts(inputs)
    x = pipeline.initial_noise([inputs.noise_seeds[row] for row in rows])
    moved, origin = inputs.to(x.device), origin.to(x.device, non_blocking=True)
    conditioning = moved.conditioning[moved.prompt[rows]]
    x = first_latents(pipeline, x, grid[0], conditioning, guidance)
    states, predictions = list[Tensor](), list[Tensor]()
    for i in range(len(grid)):
        if i == branch:
            x, conditioning = x[origin], moved.conditioning[moved.prompt]
        step = grid[i]
        prediction = pipeline.predict(x, step, conditioning, guidance)
        move = transition(pipeline.path, kernels[i], x, prediction, step)
        x_next = move.sample(step_noise(inputs.step_seeds, i, x)) if stochastic[i] else move.mean
        if i in store:
            stored = (x_next, prediction) if i - 1 in store else (x, x_next, prediction)
            *latents, output = stored if i >= branch else (tensor[origin] for tensor in stored)
            states += latents
            predictions.append(output)
        x = x_next
    final = x if branch < len(grid) else x[origin]
    empty = final.new_empty(len(final), 0, *final.shape[1:])
    before_and_after, outputs = (torch.stack(tensors, dim=1) if tensors else empty for tensors in (states, predictions))
    return Rollout(inputs, tuple(sorted(store)), before_and_after, outputs, final)


def unique_starts(inputs: RolloutInputs) -> tuple[Tensor, Tensor]:
    """Return the rows (U,) of the first sample of each (prompt, noise seed), and each sample's index (B,) in them."""
    place: dict[tuple[int, int], int] = {}
    keys = zip(inputs.prompt.tolist(), inputs.noise_seeds, strict=True)
    origin = [place.setdefault(key, len(place)) for key in keys]
    return torch.tensor([origin.index(i) for i in range(len(place))]), torch.tensor(origin)


def step_noise(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Draw standard normal noise (B, ...) from (sample seed, step) on the CPU, then cast it as ``like``."""
    return seeded_noise([(seed ^ ((step + 1) * _MIX)) % 2**63 for seed in seeds], like)


@dataclass(frozen=True)
class ReplayBatch:
    """Stored transitions that are replayed in one network call.

    The first ``count`` transitions belong to the loss. The others pad the batch to the batch size of the rollout: for
    another size a GPU may choose other kernels, whose results differ visibly at low precision.

    Attributes:
        rows: The sample (N,) long of each transition.
        stored: The stored step (N,) long of each transition, in 0..S-1.
        count: The number of transitions without padding.
    """

    rows: Tensor
    stored: Tensor
    count: int

    @property
    def index(self) -> tuple[Tensor, Tensor]:
        """Index of the transitions without padding into a tensor (B, S, ...)."""
        return self.rows[: self.count], self.stored[: self.count]

    def index_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Copy ``index`` to ``device`` without waiting for it."""
        rows, stored = self.index
        return rows.to(device, non_blocking=True), stored.to(device, non_blocking=True)

    @classmethod
    def of_step(cls, stored: int, samples: int) -> ReplayBatch:
        """Batch the transitions of all samples at one stored step."""
        return cls(torch.arange(samples), torch.full((samples,), stored), samples)

    @classmethod
    def batches(cls, mask: Tensor) -> list[ReplayBatch]:
        """Batch the transitions of ``mask`` (B, S) bool in batches of B, step after step.

        All transitions are batched if the selected ones would take as many batches.
        """
        size, steps = mask.shape
        needed = -(-int(mask.sum()) // size)
        stored, rows = (mask if needed < steps else torch.ones_like(mask)).T.nonzero(as_tuple=True)
        parts = zip(torch.split(rows, size), torch.split(stored, size), strict=True)
        padding = torch.arange(size)
        return [cls(row[padding % len(row)], step[padding % len(row)], len(row)) for row, step in parts if len(row)]


def replay(
    pipeline: Pipeline, sampled: Rollout, grid: Grid, kernel: Kernel, pairs: ReplayBatch, guidance: float
) -> ReplayedStep:
    """Replay stored transitions under the current weights; differentiable.

    Before any update, the means of a batch of all samples at one step equal the stored means bit for bit, and the means
    of other batches of this size up to rounding.

    Args:
        pipeline: The model that sampled the rollout.
        sampled: B trajectories with S stored transitions.
        grid: The sampling grid of the rollout.
        kernel: The stochastic kernel of the rollout.
        pairs: The transitions to replay.
        guidance: The guidance scale of the rollout.
    """
    unpadded, device = slice(pairs.count), sampled.states.device
    places = torch.stack([pairs.rows, sampled.before[pairs.stored], pairs.stored]).to(device, non_blocking=True)
    rows, before, stored = places
    step, x = grid[torch.tensor(sampled.steps)[pairs.stored]], sampled.states[rows, before]
    conditioning = sampled.inputs.conditioning[sampled.inputs.prompt[pairs.rows]]
    prediction = pipeline.predict(x, step, conditioning, guidance)[unpadded]
    step, x = grid[step.index[unpadded]], x[unpadded]
    new = transition(pipeline.path, kernel, x, prediction, step)
    old = transition(pipeline.path, kernel, x, sampled.prediction[rows[unpadded], stored[unpadded]], step)
    x_next = sampled.states[rows[unpadded], before[unpadded] + 1]
    return ReplayedStep(new, old, x_next, prediction, step)


def distinct_inputs(prompts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the prompts that differ in text or user, and the row (B,) long of each prompt among them."""
    distinct: dict[tuple[str, str], tuple[int, str]] = {}
    rows = [distinct.setdefault((str(p), repr(users_of(p))), (len(distinct), p))[0] for p in prompts]
    return [prompt for _, prompt in distinct.values()], torch.tensor(rows)


class SeededSamples:
    """Decoded samples of (prompt, seed) pairs in numbered batches, each of which depends on its number alone.

    Args:
        pipeline: The model.
        prompts: The texts of the samples, with their users if they have some, which are encoded at once.
        seeds: The seeds of all noise, one per sample.
        grid: The sampling grid.
        guidance: The classifier-free guidance scale; 1 is none.
        batch_size: Samples per batch.
        kernel: The move of every step.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        grid: Grid,
        guidance: float,
        batch_size: int,
        kernel: Kernel = ODE(),  # noqa: B008  # frozen
    ) -> None:
        different, rows = distinct_inputs(prompts)
        conditioning = pipeline.encode(different)
        self.pipeline, self.grid, self.guidance, self.kernel = pipeline, grid, guidance, kernel
        self.parts = RolloutInputs(conditioning, rows, tuple(seeds), tuple(seeds)).split(batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    @torch.no_grad()
    def batch(self, number: int) -> Tensor:
        """Generate the samples (B, ...) of a batch."""
        kernels = [self.kernel] * len(self.grid)
        sampled = rollout(self.pipeline, self.parts[number], self.grid, kernels, self.guidance)
        return self.pipeline.decode(sampled.final)


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    grid: Grid,
    guidance: float,
    batch_size: int,
    kernel: Kernel = ODE(),  # noqa: B008  # frozen
) -> Iterator[Tensor]:
    """Generate one decoded sample per (prompt, seed), batch by batch; the arguments are those of ``SeededSamples``."""
    samples = SeededSamples(pipeline, prompts, seeds, grid, guidance, batch_size, kernel)
    return map(samples.batch, range(len(samples)))
