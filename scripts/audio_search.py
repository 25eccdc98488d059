"""Noise-aware pruning on sounds, beside best-of-N at equal seconds: a part of ``scripts/proofs.py audio``.

The selection reward is a regressor on tones-clap, its student reads latent previews, and the verifier only judges.
Schedules are chosen on prompts and noises of their own.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipelines
from genalign import assets
from genalign.budget import measure_prices
from genalign.cli import main as genalign
from genalign.prompts import drawn_in_turn
from genalign.results import PromptRecord
from genalign.sampling import Sampling
from genalign.scoring import NamedReward
from genalign.search import BestOfN, Budget, Prune, search
from genalign.search.strategy import Strategy
from genalign.types import Prompt
from genalign.worlds import tones
from rewards.noise_aware import ScorerReward, load_scorer
from rewards.tones import TonesReward
from scripts.kept import kept

SAMPLING, BATCH = Sampling(16), 32
BUDGETS = (4, 8, 16)  # so many finished clips' seconds
SCHEDULES = tuple(
    (steps, (share,) * len(steps))
    for steps, share in itertools.chain(
        itertools.product([(3,), (4,), (6,), (7,)], (0.2, 0.33)),
        itertools.product([(3, 6), (4, 7), (6, 8)], (0.33, 0.5)),
        itertools.product([(3, 6, 8), (4, 7, 10)], (0.5,)),
    )
)
PROMPTS, TUNING_PROMPTS = 60, 24
SEEDS, TUNING_SEED = (84, 85, 86), 100  # on 81 a student of decoded previews was tried
SCORER = "scorer.safetensors"


def prepare(work: Path) -> None:
    """Train the selection reward, and then its student."""
    reward = work / "selection" / SCORER
    follows = [f"--rewards.selection.function.init_args.path={reward}", f"--student.init_args.start={reward}"]
    for name, config, options in (
        ("selection", "noise_aware_tones_selection", []),
        ("aware", "noise_aware_tones", follows),
    ):
        output = work / name
        command = ["train-noise-aware", "--config", f"scripts/configs/{config}.yaml", "--output", str(output), *options]
        if not (output / SCORER).exists() and (status := genalign(command)):
            raise SystemExit(f"{config} ended with status {status}")


@dataclass(frozen=True)
class Searches:
    """Searches in a folder of trained scorers, at prices measured once."""

    work: Path

    @functools.cached_property
    def pipeline(self) -> pipelines.DiffusersPipeline:
        return pipelines.load(assets.resolve("tones-audio"), autocast=torch.bfloat16)

    @functools.cached_property
    def selection(self) -> ScorerReward:
        return ScorerReward(self.work / "selection" / SCORER)

    @functools.cached_property
    def scorer(self) -> Any:
        return load_scorer(self.work / "aware" / SCORER)

    @functools.cached_property
    def prices(self) -> dict[str, float]:
        """Seconds of every call, measured once: the machine should be quiet then."""
        student, level, latents = (
            self.scorer.student,
            torch.full((BATCH,), 0.5),
            self.pipeline.initial_noise(range(BATCH)),
        )
        calls = [
            NamedReward("selection", self.selection),
            NamedReward("noise-aware", lambda _, prompts: student(latents, level, prompts)),
        ]
        asked, grid = drawn_in_turn(tones.prompts("val"), BATCH, 0), SAMPLING.grid(self.pipeline)
        found: dict[str, float] = kept(
            self.work / "prices.json", lambda: measure_prices(self.pipeline, calls, asked, grid, repeats=15)
        )
        return found

    @property
    def clip(self) -> float:
        """What one finished clip costs."""
        return len(SAMPLING.grid(self.pipeline)) * self.prices["forward"] + sum(
            self.prices[call] for call in ("decode", "reward/selection")
        )

    def found(
        self, name: str, strategy: Strategy, asked: Sequence[Prompt], budget: int, seed: int
    ) -> list[list[float]]:
        """The selection reward and the strict score of the chosen clip of every prompt."""

        def searched() -> list[list[float]]:
            limit = Budget(cost=budget * self.clip, prices=self.prices)
            rewards = [NamedReward("selection", self.selection)]
            result = search(self.pipeline, asked, rewards, strategy, limit, SAMPLING, BATCH, seed)
            strict = TonesReward("strict")(result.images, asked)
            print(f"{name}: {float(result.scores.mean()):.4f}, strict {float(strict.mean()):.3f}", flush=True)
            return torch.stack([result.scores[:, 0], strict], dim=1).tolist()

        rows: list[list[float]] = kept(self.work / "found" / f"{name}-at-{budget}-seed-{seed}.json", searched)
        return rows

    def pruning(self, schedule: Sequence[Sequence[float]]) -> Prune:
        steps, keep = schedule
        return Prune(tuple(map(int, steps)), tuple(keep), scorer=self.scorer)

    def schedule(self, budget: int) -> Any:
        """That of most selection reward on the tuning prompts."""
        asked = drawn_in_turn(tones.prompts("val"), TUNING_PROMPTS, TUNING_SEED)

        def reward(place: int) -> float:
            strategy = self.pruning(SCHEDULES[place])
            rows = self.found(f"tuning-{place}", strategy, asked, budget, TUNING_SEED)
            return statistics.mean(row[0] for row in rows)

        return kept(self.work / f"schedule-at-{budget}.json", lambda: SCHEDULES[max(range(len(SCHEDULES)), key=reward)])


def pruning_records(work: Path) -> list[PromptRecord]:
    """Means over the budgets, best-of-N before and pruning after, of held-out compositions."""
    prepare(work)
    searches, asked = Searches(work), drawn_in_turn(tones.prompts("comp"), PROMPTS, 0)
    return [record for seed in SEEDS for record in _records(searches, asked, seed)]


def _records(searches: Searches, asked: Sequence[Prompt], seed: int) -> list[PromptRecord]:
    ways: dict[str, Callable[[int], Strategy]] = {
        "best_of_n": lambda budget: BestOfN(),
        "pruning": lambda budget: searches.pruning(searches.schedule(budget)),
    }
    before, after = (
        np.mean([searches.found(name, strategy(b), asked, b, seed) for b in BUDGETS], axis=0).tolist()
        for name, strategy in ways.items()
    )
    metric = f"budgets {BUDGETS[0]} to {BUDGETS[-1]}"
    return [
        PromptRecord(name, f"{what}, {metric}", seed, prompt.task, prompt.text, old[score], new[score], len(BUDGETS))
        for score, (name, what) in enumerate(
            (("noise_aware_pruning", "selection reward"), ("noise_aware_pruning.strict", "strict"))
        )
        for prompt, old, new in zip(asked, before, after, strict=True)
    ]
