"""Time to a held-out score: our shipped default beside the plain loop, and what each difference between them is worth.

    python scripts/benchmarks/benchmark.py compare            all parts below, in their order
    python scripts/benchmarks/benchmark.py compare batches    seconds of a round of the plain loop by micro-batch
    python scripts/benchmarks/benchmark.py compare rates      the plain loop by learning rate, on the tuning seed
    python scripts/benchmarks/benchmark.py compare target     the score to reach, from the curves of the tuning seed
    python scripts/benchmarks/benchmark.py compare runs       five other seeds
    python scripts/benchmarks/benchmark.py compare rounds     seconds of a round, with and without each part of ours
    python scripts/benchmarks/benchmark.py compare publish    docs/results/benchmark_compare.json

Ours is ``genalign demo`` as it is shipped, without an end at which its learning rate would be zero; the plain loop has
the micro-batch and the learning rate that are best for it. A run trains until the strict accuracy of fixed held-out
images of the averaged weights has reached the target and stayed there for a minute; its time is that of sampling,
scoring and learning, without these looks, interpolated between the two looks where it arrived. Runs of a seed take
turns, round by round. A seed is saved in runs/compare_speed when all its contenders have finished; where it was
interrupted it begins anew, so that all of them use the machine at the same times. In the tuning each rate runs, and is
saved, by itself.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from genalign.cli import parsing
from genalign.cli.context import named_rewards, prompt_set
from genalign.cli.main import load_model
from genalign.cli.train_settings import Train
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import generate
from genalign.evaluation.evaluate import plan_samples
from genalign.scoring.score import NamedReward
from genalign.training.trainer import Trainer
from genalign.types import Prompt, RewardFunction
from genalign.worlds import shapes
from pipelines.base import DiffusersPipeline
from pipelines.text_embeddings import TextEmbeddings
from rewards.shapes import ShapesReward
from scripts.benchmarks.cached import cached
from scripts.benchmarks.plain_loop import PlainLoop, PlainSettings
from scripts.benchmarks.published_results import Measurement, ratios, write_results
from scripts.benchmarks.trained_runs import head

PUBLISHED_CLIP, PUBLISHED_DIMENSIONS = 1e-4, 16 * 64 * 64  # the script's clip range, and the latents that it is for
WINDOW = 3  # of the script's faster variant
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)  # for the plain loop
BATCHES = (24, 48, 96)
TUNING_SEED, SEEDS = 100, (61, 62, 63, 64, 65)
SHARE = 2 / 3  # of the least gain that a contender makes on the tuning seed: the target
LOOK, HOLD = 30.0, 60.0  # seconds of training from one look to the next, and for which a run stays at the target
LOOK_BATCH = 96
LIMIT, PATIENCE = 1500.0, 6.0  # seconds of training at most, and times those of ours where it arrives
TUNING_LIMIT = 480.0

Curve = Sequence[Sequence[float]]  # seconds of training, strict accuracy


@dataclass(frozen=True)
class Way:
    """One way to train: the plain loop, or ours with these switches; ``window`` is that of the plain loop."""

    plain: bool = False
    window: int | None = None
    overlap_scoring: bool = True
    cached: bool = True


WAYS = {
    "plain": Way(plain=True),
    "plain_window": Way(plain=True, window=WINDOW),
    "ours": Way(),
    "ours_no_overlap": Way(overlap_scoring=False),
    "ours_no_cache": Way(cached=False),
}
CONTENDERS = ("plain", "plain_window", "ours")
TURNS = 5  # rounds of every way


@cache
def shipped() -> Train:
    """Read the settings of ``genalign demo``."""
    settings, _ = parsing.parse(Train, ["--config", str(files("genalign.assets") / "demo.yaml")], "train")
    return settings


def total_reward(rewards: Sequence[NamedReward]) -> RewardFunction:
    """Return the weighted sum of rewards as one function, which the plain loop takes."""

    def score(samples: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return torch.stack([reward.weight * reward.function(samples, prompts) for reward in rewards]).sum(0)

    return score


def scaled_clip(dimensions: int) -> float:
    """Scale the published clip range to latents of ``dimensions``: a mean log-ratio varies by one over their root."""
    return PUBLISHED_CLIP * math.sqrt(PUBLISHED_DIMENSIONS / dimensions)


class SpeedContender:
    """A policy in training; every call makes a round, and ``seconds`` add up.

    Args:
        way: How it trains.
        seed: The seed of prompts, noise and the adapter.
        rate: The learning rate of the plain loop; ours has its own.
        batch: The micro-batch of the plain loop.
    """

    def __init__(self, way: Way, seed: int, rate: float = RATES[0], batch: int = BATCHES[-1]) -> None:
        settings = shipped()
        pipeline = load_model(settings.model)
        assert isinstance(pipeline, DiffusersPipeline)
        self.pipeline = pipeline
        self.policy = Policy(pipeline.denoiser, settings.lora, settings.ema_decay, seed)
        self.seconds = 0.0
        self._round = self._plain(way, seed, rate, batch) if way.plain else self._ours(way, seed)

    def __call__(self) -> None:
        began = time.perf_counter()
        self._round()
        self.seconds += time.perf_counter() - began

    def _plain(self, way: Way, seed: int, rate: float, batch: int) -> Callable[[], object]:
        settings, prompts = shipped(), prompt_set(shipped().prompts)
        fitted = settings.training.fit(prompts, settings.recipe.objective.unit)
        plain = PlainSettings(
            tuple(settings.sampling.grid(self.pipeline).sigma[:-1].tolist()),
            prompts_per_round=fitted.prompts_per_round,
            group_size=fitted.group_size,
            batch_size=batch,
            learning_rate=rate,
            clip_range=scaled_clip(math.prod(self.pipeline.latent_shape)),
            window=way.window,
            autocast=self.pipeline.autocast,
            seed=seed,
        )
        reward, average = total_reward(named_rewards(settings.rewards)), self.policy.update_average
        return PlainLoop(self.pipeline.pipe, self.policy.parameters, reward, prompts.prompts, plain, average).round

    def _ours(self, way: Way, seed: int) -> Callable[[], object]:
        settings = shipped()
        training = replace(
            settings.training,
            rounds=10**6,
            learning_rate_schedule="constant",
            seed=seed,
            overlap_scoring=settings.training.overlap_scoring and way.overlap_scoring,
        )
        rewards, prompts = named_rewards(settings.rewards), prompt_set(settings.prompts)
        trainer = Trainer(self.pipeline, self.policy, rewards, prompts, settings.recipe, training, settings.sampling)
        rounds = trainer.rounds()
        if way.cached:
            return lambda: next(rounds)

        def forgetful() -> None:
            self.pipeline._embeddings = TextEmbeddings()
            next(rounds)

        return forgetful

    def strict(self) -> float:
        """The strict accuracy of held-out images."""
        jobs, settings = plan_samples(shapes.prompts("val"), 48, 1), shipped()  # small, as looks are frequent
        sampling = settings.evaluation or settings.sampling
        grid, guidance = sampling.grid(self.pipeline), sampling.guidance_scale(self.pipeline)
        prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
        texts = [prompt.text for prompt in prompts]
        with self.policy.averaged():
            images = torch.cat(list(generate(self.pipeline, texts, seeds, grid, guidance, LOOK_BATCH)))
        return float(ShapesReward("strict")(images, prompts).mean())


@dataclass(frozen=True)
class Workspace:
    """The folder that keeps what was measured."""

    folder: Path

    def batch(self) -> int:
        """The micro-batch of the plain loop's fastest rounds."""
        seconds = cached(self.folder / "batches.json", round_seconds)
        return min(BATCHES, key=lambda size: seconds[str(size)])

    def contender(self, name: str, seed: int, rate: float | None = None) -> SpeedContender:
        """Start a run of a way, which for the plain loop is at its best rate unless another one is given."""
        if not WAYS[name].plain:
            return SpeedContender(WAYS[name], seed)
        return SpeedContender(WAYS[name], seed, rate or self.rate(name), self.batch())

    def tuning(self, name: str) -> dict[str, Curve]:
        """The curves on the tuning seed: of the plain loop by learning rate, and of ours as it is."""

        def run(rate: float | None) -> Curve:
            makers = {label(rate): partial(self.contender, name, TUNING_SEED, rate)}
            return race(makers, f"tuning {name}", target=math.inf, limit=TUNING_LIMIT)[label(rate)]

        rates, folder = RATES if WAYS[name].plain else (None,), self.folder / "tuning" / name
        return {label(rate): cached(folder / f"{label(rate)}.json", partial(run, rate)) for rate in rates}

    def target(self) -> float:
        """The score to reach: a share of the gain of whichever contender gains least, each at its best rate."""

        def choose() -> float:
            tuned = [self.tuning(name).values() for name in CONTENDERS]
            start = min(curve[0][1] for curves in tuned for curve in curves)
            highest = min(max(level(curve) for curve in curves) for curves in tuned)
            if highest <= start:
                raise ValueError(f"a contender gains nothing on seed {TUNING_SEED}: there is no score to race for")
            return round(start + SHARE * (highest - start), 3)

        return float(cached(self.folder / "target.json", choose))

    def rate(self, name: str) -> float:
        """The plain loop's learning rate that arrives first on the tuning seed, or comes nearest."""
        curves, target = self.tuning(name), self.target()
        return min(RATES, key=lambda rate: (arrival(curves[label(rate)], target), -level(curves[label(rate)])))

    def curves(self, seed: int) -> dict[str, Curve]:
        """The curves of the contenders on a seed."""
        makers = {name: partial(self.contender, name, seed) for name in CONTENDERS}

        def run() -> Mapping[str, Curve]:
            return race(makers, str(seed), self.target(), pace="ours")

        result: dict[str, Curve] = cached(self.folder / "runs" / f"{seed}.json", run)
        return result

    def seconds(self, name: str, seed: int) -> float:
        """To the target, or to the last look where it was not reached."""
        curve = self.curves(seed)[name]
        return min(arrival(curve, self.target()), curve[-1][0])

    def arrived(self, name: str, seed: int) -> bool:
        return arrival(self.curves(seed)[name], self.target()) < math.inf

    def rounds(self) -> dict[str, list[float]]:
        """Seconds of rounds of every way."""

        def run() -> dict[str, list[float]]:
            return dict(zip(WAYS, in_turn([self.contender(name, TUNING_SEED) for name in WAYS], TURNS), strict=True))

        result: dict[str, list[float]] = cached(self.folder / "rounds.json", run)
        return result


def label(rate: float | None) -> str:
    """Return the name of a tuning run."""
    return "shipped" if rate is None else f"{rate:g}"


def race(
    makers: Mapping[str, Callable[[], SpeedContender]],
    title: str,
    target: float,
    limit: float = LIMIT,
    pace: str | None = None,
) -> Mapping[str, Curve]:
    """Train all contenders in turn, and return their curves.

    A contender stops once it has stayed at the target, after ``limit`` seconds, or after ``PATIENCE`` times the seconds
    of the contender ``pace``. The contender that has trained least runs the next round, so that all use the machine at
    the same times.

    Args:
        makers: What starts the contenders.
        title: The name of the race, in front of each look that is printed.
        target: The score at which a contender has arrived.
        limit: Seconds of training.
        pace: The contender whose arrival limits the others.
    """
    running = {name: make() for name, make in makers.items()}
    curves = {name: [(0.0, contender.strict())] for name, contender in running.items()}
    while running:
        arrived = arrival(curves[pace], target) if pace else math.inf
        name = min(running, key=lambda name: running[name].seconds)
        contender, curve = running[name], curves[name]
        if contender.seconds < min(limit, PATIENCE * arrived):
            contender()
            if contender.seconds >= curve[-1][0] + LOOK:
                curve.append((contender.seconds, contender.strict()))
                print(title, name, *(round(value, 3) for value in curve[-1]), flush=True)
            if arrival(curve, target) == math.inf:
                continue
        del running[name]
    return curves


def arrival(curve: Sequence[Sequence[float]], target: float) -> float:
    """Seconds to the first look at the target after which a minute of looks is there, too; infinite without one.

    The time is read on the line between this look and the one before.
    """
    for place, ((before, low), (after, high)) in enumerate(pairwise(curve)):
        if low < target <= high:
            for seconds, strict in curve[place + 2 :]:
                if strict < target:
                    break
                if seconds >= after + HOLD:
                    return before + (after - before) * (target - low) / (high - low)
    return math.inf


def level(curve: Sequence[Sequence[float]]) -> float:
    """The highest mean strict accuracy of three consecutive looks."""
    strict = [value for _, value in curve]
    return max(statistics.mean(strict[i : i + 3]) for i in range(max(1, len(strict) - 2)))


def round_seconds() -> dict[str, float]:
    """The plain loop's seconds of a round by micro-batch, the median of three rounds after one, in turn."""
    columns = in_turn([SpeedContender(WAYS["plain"], TUNING_SEED, RATES[0], size) for size in BATCHES], 3)
    return {str(size): statistics.median(column) for size, column in zip(BATCHES, columns, strict=True)}


def in_turn(contenders: list[SpeedContender], turns: int) -> list[list[float]]:
    """Seconds of each one's rounds, after one round that does not count."""
    ends: list[list[float]] = [[] for _ in contenders]
    for _ in range(turns + 1):
        for contender, column in zip(contenders, ends, strict=True):
            contender()
            column.append(contender.seconds)
    return [[after - before for before, after in pairwise(column)] for column in ends]


def batches(work: Workspace) -> None:
    """Print the plain loop's fastest micro-batch."""
    print("plain fastest with batches of", work.batch())


def rates(work: Workspace) -> None:
    """Print the highest level of each contender and rate on the tuning seed."""
    for name in CONTENDERS:
        for rate, curve in work.tuning(name).items():
            print(name, rate, round(level(curve), 3))


def target(work: Workspace) -> None:
    """Print the target, and the plain loop's rates."""
    print("target", work.target(), {name: work.rate(name) for name in CONTENDERS if WAYS[name].plain})


def rounds(work: Workspace) -> None:
    """Print the median seconds of a round of each contender."""
    for name, seconds in work.rounds().items():
        print(name, round(statistics.median(seconds), 1), "s a round")


def runs(work: Workspace) -> None:
    """Print the seconds to the target of each contender and seed."""
    for seed in SEEDS:
        for name in CONTENDERS:
            arrived = "" if work.arrived(name, seed) else ", not arrived"
            print(f"{name} {seed} {work.seconds(name, seed):.0f} s{arrived}", flush=True)


def times(work: Workspace) -> list[Measurement]:
    """Seconds, ratios of all seeds and of each, and lost runs; seconds of those that do not arrive are a bound."""
    measured: list[Measurement] = []
    for name in CONTENDERS:
        metric = f"seconds to {work.target()}{_bound(work, name)}"
        measured += [Measurement(name, metric, work.seconds(name, seed)) for seed in SEEDS]
        lost = sum(not work.arrived(name, seed) for seed in SEEDS)
        measured.append(Measurement(f"lost.{name}", f"runs of {len(SEEDS)} that did not arrive", float(lost)))
        if name != "ours":
            # A seed on which ours does not arrive counts as a speedup of 0
            ours = [work.seconds("ours", seed) if work.arrived("ours", seed) else math.inf for seed in SEEDS]
            each = [work.seconds(name, seed) for seed in SEEDS]
            measured += ratios(f"speedup.{name}", f"its seconds over ours{_bound(work, name, 'ours')}", each, ours)
            for seed, top, bottom in zip(SEEDS, each, ours, strict=True):
                bound = "" if work.arrived(name, seed) and work.arrived("ours", seed) else ", at least"
                measured += ratios(f"speedup.{name}.{seed}", f"its seconds over ours{bound}", [top], [bottom])
    return measured


def _bound(work: Workspace, *names: str) -> str:
    return "" if all(work.arrived(name, seed) for name in names for seed in SEEDS) else ", at least"


def levels(work: Workspace) -> list[Measurement]:
    """The highest level of each contender on the tuning seed: where it is above the target, it had not leveled off."""
    metric = f"highest strict accuracy in {TUNING_LIMIT:.0f} s of the tuning seed"
    return [Measurement(f"level.{name}", metric, max(map(level, work.tuning(name).values()))) for name in CONTENDERS]


def costs(work: Workspace) -> list[Measurement]:
    """What a round of each way takes beside ours."""
    by_round = work.rounds()
    measured: list[Measurement] = []
    for name in (name for name in WAYS if name != "ours"):
        measured += ratios(f"round.{name}", "seconds of a round over ours", by_round[name], by_round["ours"])
    return measured


def publish(work: Workspace) -> None:
    """Write the results of the benchmark."""
    settings = {name: {"learning_rate": work.rate(name), "batch_size": work.batch()} for name in CONTENDERS[:2]}
    claim = (
        f"Wall-clock of training until the held-out strict accuracy of the shapes world stays at {work.target()} for a"
        " minute: the shipped default beside the loop of Flow-GRPO's script, and what a round of each costs"
    )
    extra: dict[str, Any] = {
        "chosen": settings,
        "target": work.target(),
        "curves": {name: [work.curves(seed)[name] for seed in SEEDS] for name in CONTENDERS},
        "tuning": {name: work.tuning(name) for name in CONTENDERS},
    }
    header = head(claim, "python scripts/benchmarks/benchmark.py compare")
    measured = [*times(work), *levels(work), *costs(work)]
    write_results(Path("docs/results"), "benchmark_compare", {**header, **extra}, measured)


PARTS = {"batches": batches, "rates": rates, "target": target, "runs": runs, "rounds": rounds, "publish": publish}
