"""Counts the calls of a training run by running its real loop on a toy pipeline whose samples are single numbers."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as Folder
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from genalign.algorithms.advantages import UnsuitableScoresError
from genalign.algorithms.companions import LatentProxy
from genalign.algorithms.credit import GroupRelative, SetContrast
from genalign.algorithms.interfaces import Credit, RoundScores
from genalign.algorithms.recipe import Recipe
from genalign.diffusion.noise import seeded_noise
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import Kernel
from genalign.scoring.budget import Ledger
from genalign.scoring.score import NamedReward
from genalign.training.compatibility import require_comparable
from genalign.training.credit_trial import try_credit
from genalign.training.offline import OfflineSampler
from genalign.training.pools import Pool
from genalign.training.settings import FittedSettings, TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Conditioning, Grid, NoiseLevel, Path, Pipeline, PromptSet

COUNTED_ROUNDS = 10_000
"""The number of rounds whose trained steps are chosen individually, within seconds; a longer run repeats them."""


class ToyPipeline:
    """A pipeline with a real path and grid, whose latents and samples are single numbers, (B, 1)."""

    compute_dtype = torch.float32

    def __init__(
        self, path: Path, grid: Grid, level: Callable[[Tensor], NoiseLevel], other_grid: Callable[[int], Grid]
    ) -> None:
        self.path, self.level, self.steps, self.other_grid = path, level, grid, other_grid
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, 0.1)
        self.denoiser: nn.Module = nn.Sequential(layer)

    @classmethod
    def like(cls, pipeline: Pipeline, sampling: Sampling) -> Self:
        """Copy path, grid and training levels from a pipeline, which may be on the meta device."""
        return cls(pipeline.path, sampling.grid(pipeline), pipeline.level, pipeline.grid)

    @classmethod
    def flow(cls, num_steps: int) -> Self:
        """Use a flow with equal steps, for a checkpoint that could not be opened."""

        def grid(steps: int) -> Grid:
            sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            return Grid(1000 * sigma[:-1], 1 - sigma, sigma)

        return cls(FlowPath(), grid(num_steps), lambda u: NoiseLevel(1000 * u, 1 - u, u), grid)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"text": torch.zeros(len(prompts), 1)})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        return self.steps if num_steps == len(self.steps) else self.other_grid(num_steps)

    def guidance_scale(self, guidance: float | None) -> float:
        return 1.0 if guidance is None else guidance

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return seeded_noise(seeds, torch.empty(1, 1))

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        output: Tensor = self.denoiser(x)
        return output

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class _MeanOfLatents(nn.Module):
    """The scaled mean of latents, which stands in for the network of a proxy while the calls of a round are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        scores: Tensor = self.scale * latents.flatten(1).mean(1)
        return scores


@dataclass(frozen=True)
class _CreditOfToyScores:
    """A credit, or GRPO's (B,) if it refuses scores whose range or groups differ from those of the real run."""

    takes_single_samples: ClassVar[bool] = True
    credit: Credit

    def __call__(self, scores: RoundScores) -> Tensor:
        try:
            return self.credit(scores)
        except UnsuitableScoresError:
            return GroupRelative()(scores)


def without_networks(recipe: Recipe) -> Recipe:
    """Replace the parts that need weights or real scores.

    The features of samples become their first number, the reward of a set a mean, and the credit takes any scores.
    """
    if recipe.features:
        recipe = replace(recipe, features=lambda samples: samples.flatten(1)[:, :1])
    if isinstance(recipe.companion, LatentProxy):
        recipe = replace(recipe, companion=replace(recipe.companion, network=_MeanOfLatents))
    if isinstance(recipe.credit, SetContrast):
        recipe = replace(recipe, credit=replace(recipe.credit, reward=lambda features: float(features.mean())))
    return replace(recipe, credit=_CreditOfToyScores(recipe.credit))


@dataclass(frozen=True)
class DryRun:
    """The calls of the ``first`` round and of all ``rounds``.

    ``windows`` are the different sets of trained steps, and ``stored`` the tensors of a latent's size that a round
    stores for each sample.
    """

    rounds: int
    windows: tuple[tuple[int, ...], ...]
    first: Ledger
    total: Ledger
    stored: int


def dry_run(
    toy: ToyPipeline,
    rewards: Sequence[NamedReward],
    prompts: PromptSet,
    recipe: Recipe,
    settings: TrainerSettings,
    guidance: float,
    kernel: Kernel | None = None,
) -> DryRun:
    """Count every call of a run, assuming that no two scores are equal if a method's calls depend on them.

    For each set of trained steps one round is run by the real ``Trainer``, with and without the gradients of a balance
    of rewards; the other rounds repeat it. The sets of trained steps are those of the first ``COUNTED_ROUNDS`` rounds,
    which a longer run repeats in order.

    Args:
        toy: The pipeline to run on.
        rewards: The rewards, of which only names and weights are used.
        prompts: The prompts of the run, or as many others.
        recipe: The method.
        settings: Size and number of rounds.
        guidance: The guidance scale; above 1 a prediction counts twice.
        kernel: The kernel of the steps that the recipe does not train; None is the ODE.

    Raises:
        ValueError: The recipe, its kernel and the settings do not fit together.
    """

    def within_0_and_1(samples: Tensor, _: object) -> Tensor:  # some credits need it
        return samples[:, 0].sigmoid()

    require_comparable(recipe, settings)
    rewards = [replace(r, function=within_0_and_1, weight=float(r.weight != 0)) for r in rewards]
    try_credit(recipe, rewards, settings.prompts_per_round or 2, settings.group_size, steps=2)
    recipe = without_networks(recipe)
    one_round = replace(settings, rounds=COUNTED_ROUNDS, warmup_rounds=0, max_nfe=None, optimizer="adamw", data=None)
    pool = Pool.load(Folder(settings.data)).with_groups_of(settings.group_size) if settings.data else None
    prompts = pool.restricted(prompts) if pool else prompts
    sampling = Sampling(len(toy.steps), guidance=guidance, kernel=kernel)

    updates = settings.fit(prompts, recipe.objective.unit).updates_per_round * settings.epochs
    order: list[tuple[tuple[int, ...], int]] = []
    rounds: dict[tuple[tuple[int, ...], int], tuple[Ledger, int]] = {}
    total = Counter[str]()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # about how the toy learns
    try:
        while len(order) < COUNTED_ROUNDS and settings.progress(len(order), total["nfe"]) < 1:
            index, steps = len(order), recipe.steps(toy.path, toy.steps, len(order), settings.seed)
            solved = recipe.balance.times(index * updates, updates) if recipe.balance else 0
            order.append(kind := (steps, solved))
            if kind not in rounds:
                fixed, pipeline = replace(recipe, schedule=lambda *_, steps=steps: steps), copy.copy(toy)
                pipeline.denoiser = copy.deepcopy(toy.denoiser)  # ``level`` may be a method of a whole pipeline
                policy = Policy(pipeline.denoiser, Lora(1, 1, ["0"]) if recipe.shifts_noise else None)
                trainer = Trainer(pipeline, policy, rewards, prompts, fixed, one_round, sampling)
                if pool:
                    of_toys = replace(pool, read=lambda rows: torch.rand(len(rows), 1))
                    trainer.sampler = OfflineSampler(
                        trainer.pipeline, trainer.rewards, of_toys, trainer.settings, keep_samples=False
                    )
                trainer.rounds_done = index
                next(trainer.rounds())
                calls = trainer.ledger.copy()
                batch = next(trainer.sampler(fixed, steps, next(trainer.prompts.rounds()), "stored"))
                stored = sum(tensor.numel() for tensor in batch.rollout.tensors().values())
                rounds[kind] = calls, stored // len(batch.scores)
            total.update(rounds[kind][0].counts)
    finally:
        logging.disable(disabled)
    count, total = _repeat([rounds[kind][0] for kind in order], settings.fit(prompts, recipe.objective.unit))
    windows = tuple(dict.fromkeys(steps for steps, _ in rounds))
    return DryRun(count, windows, rounds[order[0]][0], Ledger(total), max(n for _, n in rounds.values()))


def _repeat(first: Sequence[Ledger], settings: FittedSettings) -> tuple[int, Counter[str]]:
    """Repeat the calls of the first rounds until the run ends; return the number of rounds and their calls."""
    cycle = Counter[str]()
    for ledger in first:
        cycle.update(ledger.counts)
    whole = (settings.rounds - 1) // len(first)
    if settings.max_nfe:
        whole = min(whole, (settings.max_nfe - 1) // cycle["nfe"])
    count, total = whole * len(first), Counter({call: whole * number for call, number in cycle.items()})
    for ledger in first:
        if settings.progress(count, total["nfe"]) >= 1:
            break
        total.update(ledger.counts)
        count += 1
    return count, total
