"""Sampling: trajectories with stored transitions, their replay under the current weights, and plain generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.diffusion.noise import seeded_noise
from genalign.diffusion.transitions import ODE, Kernel, Transition, transition
from genalign.runtime.distributed import ALL, Share
from genalign.types import Conditioning, Grid, NoiseStep, Pipeline

_MIX = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: neighbouring seeds land far apart


@dataclass(frozen=True)
class RolloutInputs:
    """Where B trajectories begin. ``prompt`` (B,) long names rows of ``conditioning`` (P rows); ``noise_seeds`` draw
    the initial latents and ``step_seeds`` the noise of the stochastic steps, one of each per sample."""

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

    def split(self, size: int) -> Iterator[RolloutInputs]:
        """Consecutive parts of at most ``size`` samples."""
        for begin in range(0, len(self), size):
            part = slice(begin, begin + size)
            yield RolloutInputs(self.conditioning, self.prompt[part], self.noise_seeds[part], self.step_seeds[part])


@dataclass(frozen=True)
class Rollout:
    """B trajectories, of which only the transitions to be trained are kept.

    ``x``, ``x_next``, ``mean`` and ``prediction`` (B, S, ...) float32 are states, the sampling policy's transition
    means and the network's outputs at the grid's ``steps`` (S); ``final`` (B, ...) are the latents at sigma = 0.
    """

    inputs: RolloutInputs
    steps: tuple[int, ...]
    x: Tensor
    x_next: Tensor
    mean: Tensor
    prediction: Tensor
    final: Tensor

    def split(self, size: int) -> Iterator[Rollout]:
        """Consecutive parts of at most ``size`` samples."""
        for place, start in enumerate(self.inputs.split(size)):
            rows = slice(place * size, place * size + len(start))
            yield Rollout(start, self.steps, *(tensor[rows] for tensor in self._tensors()))

    def finite(self) -> Tensor:
        """Which samples (B,) ended in finite latents."""
        return finite_rows(self.final)

    def emptied(self, rows: Tensor) -> Rollout:
        """With zeros for the tensors of the samples ``rows`` (B,) bool: in a gradient, NaN times no credit is NaN."""
        chosen = rows.nonzero()[:, 0]
        emptied = (tensor.clone().index_fill_(0, chosen, 0) for tensor in self._tensors())
        return Rollout(self.inputs, self.steps, *emptied)

    def _tensors(self) -> tuple[Tensor, ...]:
        """Those with a row for each sample, in their order."""
        return self.x, self.x_next, self.mean, self.prediction, self.final


def finite_rows(tensor: Tensor) -> Tensor:
    """Which rows (B,) of a tensor (B, ...) are finite throughout."""
    return tensor.isfinite().flatten(1).all(1)


@dataclass(frozen=True)
class ReplayedStep:
    """One stored transition under the current weights (``new``) and under those that sampled it (``old``)."""

    new: Transition
    old: Transition
    x_next: Tensor
    prediction: Tensor
    step: NoiseStep

    @property
    def log_ratio(self) -> Tensor:
        """log p_new(x_next | x) - log p_old(x_next | x), (B,), a mean over dimensions."""
        return self.new.log_ratio(self.old, self.x_next)


def windowed(kernel: Kernel, steps: Sequence[int], total: int) -> tuple[Kernel, ...]:
    """``kernel`` at ``steps`` and the ODE elsewhere, for a grid of ``total`` steps."""
    return tuple(kernel if i in steps else ODE() for i in range(total))


@torch.no_grad()
def rollout(
    pipeline: Pipeline,
    start: RolloutInputs,
    grid: Grid,
    kernels: Sequence[Kernel],
    guidance: float,
    store: Sequence[int] = (),
) -> Rollout:
    """Sample B trajectories with one kernel per step, keeping the transitions of the steps in ``store``.

    Samples of one prompt that share their initial noise are one sample until the first stochastic step, and are
    computed once until there.
    """
    noisy = _noisy(kernels, grid)
    branch = noisy.index(True) if any(noisy) else len(grid)
    rows, origin = distinct(start)
    x = pipeline.initial_noise([start.noise_seeds[row] for row in rows])
    conditioning = start.conditioning[start.prompt[rows]]
    kept: list[tuple[Tensor, ...]] = []
    for i in range(len(grid)):
        if i == branch:
            x, conditioning = x[origin], start.conditioning[start.prompt]
        step = grid[i]
        prediction = pipeline.predict(x, step, conditioning, guidance)
        move = transition(pipeline.path, kernels[i], x, prediction, step)
        x_next = move.sample(step_noise(start.step_seeds, i, x)) if noisy[i] else move.mean
        if i in store:
            kept.append((x, x_next, move.mean, prediction))
        x = x_next
    final = x if branch < len(grid) else x[origin]
    states, nexts, means, outputs = (_stacked([tensors[field] for tensors in kept], final) for field in range(4))
    return Rollout(start, tuple(sorted(store)), states, nexts, means, outputs, final)


def _noisy(kernels: Sequence[Kernel], grid: Grid) -> list[bool]:
    """Which steps add noise."""
    if len(kernels) != len(grid):
        raise ValueError(f"one kernel per step: the grid has {len(grid)} steps, got {len(kernels)} kernels")
    return [bool(kernel(grid[i]).s > 0) for i, kernel in enumerate(kernels)]


def _stacked(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """(B, S, ...) from S tensors (B, ...), S = 0 included."""
    return torch.stack(list(tensors), dim=1) if tensors else like.new_empty(len(like), 0, *like.shape[1:])


def distinct(start: RolloutInputs) -> tuple[Tensor, Tensor]:
    """Rows (U,) of the first samples of each (prompt, noise seed), and (B,) which of them each sample equals."""
    first: dict[tuple[int, int], int] = {}
    keys = list(zip(start.prompt.tolist(), start.noise_seeds, strict=True))
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    place = {key: i for i, key in enumerate(first)}
    return torch.tensor(list(first.values())), torch.tensor([place[key] for key in keys])


def step_noise(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Standard normal noise shaped and placed as ``like`` (B, ...), drawn on the CPU from (sample seed, step)."""
    return seeded_noise([(seed ^ ((step + 1) * _MIX)) % 2**63 for seed in seeds], like)


@dataclass(frozen=True)
class ReplayBatch:
    """Pairs of a sample and a stored transition (0..S-1) that go through the network in one batch: ``rows`` and
    ``stored`` (N,) long. Those from ``live`` on only fill it up: a batch of another size may be computed in another
    way, and differ in more than the last bits at low precision."""

    rows: Tensor
    stored: Tensor
    live: int

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """Where the live ones are in a tensor (B, S)."""
        return self.rows[: self.live], self.stored[: self.live]

    @classmethod
    def of_step(cls, stored: int, samples: int) -> ReplayBatch:
        """All samples at one stored transition."""
        return cls(torch.arange(samples), torch.full((samples,), stored), samples)

    @classmethod
    def batches(cls, live: Tensor) -> list[ReplayBatch]:
        """What is ``live`` (B, S) bool, step after step in batches of B samples; all pairs, where those that are live
        would take as many batches."""
        size, steps = live.shape
        needed = -(-int(live.sum()) // size)
        stored, rows = (live if needed < steps else torch.ones_like(live)).T.nonzero(as_tuple=True)
        parts = zip(torch.split(rows, size), torch.split(stored, size), strict=True)
        return [cls(_repeated(row, size), _repeated(step, size), len(row)) for row, step in parts if len(row)]


def _repeated(values: Tensor, size: int) -> Tensor:
    """The first ``size`` of the values, over and over."""
    return values[torch.arange(size) % len(values)]


def replay(
    pipeline: Pipeline, sampled: Rollout, grid: Grid, kernel: Kernel, pairs: ReplayBatch, guidance: float
) -> ReplayedStep:
    """Stored transitions under the current weights, of the live ``pairs``; differentiable.

    Of all samples at one transition, and before any update, the means equal the stored ones bit for bit; in another
    order, in a batch of that size, up to rounding.
    """
    step, x = grid[torch.tensor(sampled.steps)[pairs.stored]], sampled.x[pairs.rows, pairs.stored]
    conditioning = sampled.inputs.conditioning[sampled.inputs.prompt[pairs.rows]]
    prediction = pipeline.predict(x, step, conditioning, guidance)[: pairs.live]
    at = pairs.at
    step = grid[step.index[: pairs.live]]
    new = transition(pipeline.path, kernel, x[: pairs.live], prediction, step)
    return ReplayedStep(new, Transition(sampled.mean[at], new.std), sampled.x_next[at], prediction, step)


@torch.no_grad()
def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    grid: Grid,
    guidance: float,
    batch_size: int,
    share: Share = ALL,
    done: Collection[int] = (),
) -> Iterator[Tensor]:
    """Decoded ODE samples, batch by batch, one per (prompt, seed): the batches of a ``share`` but for the numbers
    ``done``. Without these its processes run the network equally often, as a divided one needs."""
    distinct = list(dict.fromkeys(prompts))
    conditioning = pipeline.encode(distinct)
    place = {text: i for i, text in enumerate(distinct)}
    start = RolloutInputs(conditioning, torch.tensor([place[text] for text in prompts]), tuple(seeds), tuple(seeds))
    parts = list(start.split(batch_size))
    for number in share.in_step(len(parts)):
        if number in done:
            continue
        made = pipeline.decode(rollout(pipeline, parts[number % len(parts)], grid, [ODE()] * len(grid), guidance).final)
        if number < len(parts):
            yield made
