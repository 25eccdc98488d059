"""What a training run will call, counted by the run itself: the real loop on a stand-in of one number a sample."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from genalign.algorithms.credit import SetContrast
from genalign.algorithms.recipes import Recipe
from genalign.diffusion.noise import seeded_noise
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.policy import Policy
from genalign.diffusion.sampling import Sampling
from genalign.scoring.budget import Ledger
from genalign.scoring.score import NamedReward
from genalign.training.trainer import Trainer, TrainerSettings
from genalign.types import Conditioning, Grid, NoiseLevel, Path, Pipeline, Prompt, PromptSet


@dataclass(frozen=True)
class Levels:
    """What of a checkpoint decides how often its network is called: its path, its grid and its training levels."""

    path: Path
    grid: Grid
    level: Callable[[Tensor], NoiseLevel]

    @classmethod
    def of(cls, pipeline: Pipeline, sampling: Sampling) -> Levels:
        """Those of a pipeline, which may be without values."""
        return cls(pipeline.path, sampling.grid(pipeline), pipeline.level)

    @classmethod
    def straight(cls, num_steps: int) -> Levels:
        """A flow on equal steps, for a checkpoint that is not known."""
        sigma = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return cls(FlowPath(), Grid(1000 * sigma[:-1], 1 - sigma, sigma), lambda u: NoiseLevel(1000 * u, 1 - u, u))


class StandIn:
    """A pipeline whose samples are one number, and whose network is a multiplication."""

    def __init__(self, levels: Levels) -> None:
        self.path, self.level, self._grid = levels.path, levels.level, levels.grid
        self.denoiser: nn.Module = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.denoiser.weight, 0.1)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One zero for each prompt."""
        return Conditioning({"text": torch.zeros(len(prompts), 1)})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """The one that it was made with."""
        return self._grid

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, 1)."""
        return seeded_noise(seeds, torch.empty(1, 1))

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """A tenth of x (B, 1)."""
        output: Tensor = self.denoiser(x)
        return output

    def decode(self, latents: Tensor) -> Tensor:
        """The latents."""
        return latents


@dataclass(frozen=True)
class Counted:
    """Ledgers of the first round and of all ``rounds``. ``stored`` is how many numbers a round keeps for each number of
    a latent of each sample; ``windows`` are the different sets of steps that rounds train.
    """

    rounds: int
    windows: tuple[tuple[int, ...], ...]
    first: Ledger
    total: Ledger
    stored: int


def count(
    levels: Levels,
    rewards: Sequence[NamedReward],
    prompts: PromptSet,
    recipe: Recipe,
    settings: TrainerSettings,
    guidance: float,
) -> Counted:
    """Every call of a run, provided that no two rewards are equal where a method looks at which is larger.

    A round of each set of trained steps is run with the real ``Trainer``, on stand-ins for the network, the rewards and
    set features; the others repeat it. Raises ValueError where the recipe, the kernel or the settings are refused.
    """
    total = Counter[str]()
    windows: dict[tuple[int, ...], tuple[Ledger, int]] = {}
    order: list[tuple[int, ...]] = []
    for index in range(settings.rounds):
        if settings.progress(index, total["forward"]) >= 1:
            break
        order.append(recipe.steps(levels.grid, index, settings.seed))
        if order[-1] not in windows:
            windows[order[-1]] = _round(levels, rewards, prompts, _on(recipe, order[-1]), settings, guidance)
        total.update(windows[order[-1]][0].counts)
    stored = max(numbers for _, numbers in windows.values())
    return Counted(len(order), tuple(windows), windows[order[0]][0], Ledger(total), stored)


def _on(recipe: Recipe, steps: tuple[int, ...]) -> Recipe:
    """The recipe on these steps in every round, with a set reward that needs no network."""
    credit = replace(recipe.credit, reward=_middle) if isinstance(recipe.credit, SetContrast) else recipe.credit
    features = _flat if recipe.features else None
    return replace(recipe, schedule=lambda *_: steps, credit=credit, features=features)


def _round(
    levels: Levels,
    rewards: Sequence[NamedReward],
    prompts: PromptSet,
    recipe: Recipe,
    settings: TrainerSettings,
    guidance: float,
) -> tuple[Ledger, int]:
    """What one round calls, and how many numbers it stores for a sample."""
    pipeline = StandIn(levels)
    named = [replace(reward, function=_number, weight=float(reward.weight != 0)) for reward in rewards]
    once = replace(settings, rounds=1, max_nfe=None, optimizer="adamw")
    sampling = Sampling(len(levels.grid), guidance=guidance)
    with _silence():
        trainer = Trainer(pipeline, Policy(pipeline.denoiser, None), named, prompts, recipe, once, sampling)
        next(trainer.rounds())
        ledger = trainer.ledger.copy()
        asked = next(trainer.prompts.rounds())
        part = next(trainer.sampler(recipe, recipe.steps(levels.grid, 0, 0), asked, "stored"))
    kept = [value for value in vars(part.rollout).values() if isinstance(value, Tensor)]
    return ledger, sum(tensor.numel() for tensor in kept) // len(part.samples)


def _number(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0]


def _middle(features: Tensor) -> float:
    return float(features.mean())


def _flat(samples: Tensor) -> Tensor:
    return samples


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No warnings about the learning of a stand-in."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
