"""Noise-aware pruning (TTSnap) beside other searches at equal cost in the shapes world.

    prepare     the selection reward, trained on clean images alone, and its noise-aware students
    prices      what every call costs here, on a quiet machine
    record      pools of trajectories of the base and of models that Flow-GRPO tuned, scored in every way
    tune        schedules on prompts of val, in seconds and in NFE; the learning rate of ReNO on some of them
    search      live searches of the base with ReNO, by itself and after best-of-N and pruning
    publish     curves and gains, on prompts of comp

The selection reward is a regressor on shapes-clip; the verifier only judges. A budget is so many samples' cost, in
seconds or in NFE. A mean is over tasks of the means over their prompts. Every part resumes; the pools need the models
of ``scripts/benchmarks/proofs.py methods``.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.diffusion.sampling import Sampling
from genalign.evaluation.records import PromptRecord, mean
from genalign.reward_learning.noise_aware import ranking_quality
from genalign.scoring.budget import Budget
from genalign.scoring.score import NamedReward
from genalign.search import BestOfN, Prune, ReNO
from genalign.search.engine import SearchRun
from genalign.search.pruning import PruneSchedule
from genalign.search.strategy import Strategy
from genalign.types import Prompt
from scripts.benchmarks import search_pool
from scripts.benchmarks.base_weights import require_base
from scripts.benchmarks.cached import cached
from scripts.benchmarks.pruning_trials import Costs, Trials, best_of, schedules, task_mean
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.search_pool import LEVELS, POOLS, SEEDS, STEPS, STUDENTS, PoolSource, RecordedPool
from scripts.benchmarks.steering_table import TOLERANCE
from scripts.benchmarks.trained_runs import RESULTS, head, run_genalign
from scripts.pretrain import selection_reward

BUDGETS = (2, 4, 8, 16, 32)
UNITS = ("seconds", "nfe")
WAYS: dict[str, tuple[str, ...]] = {  # of scoring previews, one for each seed of a student
    "raw_pruning": ("raw",),
    "noise_aware_pruning": STUDENTS[:3],
    "noise_aware_latent_pruning": STUDENTS[3:],
    "random_pruning": ("random",),
    "oracle_pruning": ("oracle",),
}
CLAIMED = ("noise_aware_pruning", "noise_aware_latent_pruning", "raw_pruning")
TRIALS, SUBSETS = 8, 40
LIVE_BUDGETS, LIVE_SEEDS, CHUNK = (8, 32), (11, 12, 13), 12
LIVE = PoolSource("comp", 60)
RENO_RATES, RENO_TUNING = (5.0, 20.0, 80.0), 24

Method = Callable[[int], tuple[Tensor, float]]
"""From a budget to the clean scores (P, 2) by the selection reward and the verifier, and the share that it spends."""


def prepare(work: Path) -> None:
    """Train the selection reward, then the students of it, all on the same recorded trajectories."""
    reward = work / "selection" / "reward.safetensors"
    if not reward.exists():
        selection_reward.main(["shapes", "--output", str(reward)])
    for student in STUDENTS:
        if (work / student / "scorer.safetensors").exists():
            continue
        (work / student).mkdir(parents=True, exist_ok=True)
        for path in (work / STUDENTS[0]).glob("*-*.safetensors") if student != STUDENTS[0] else ():
            shutil.copy(path, work / student / path.name)
        kind, seed = student.split("-")
        config = f"scripts/configs/noise_aware/shapes_{kind}.yaml"
        options = ["--output", str(work / student), "--seed", seed, "--distillation.seed", seed]
        options.append(f"--rewards.selection.function.init_args.weights={reward}")
        run_genalign("train-noise-aware", "--config", config, *options)


def tune(work: Path) -> None:
    """Choose what gives most reward on the tuning prompts, at each budget in each unit.

    Of every way of pruning that is a schedule, and one that reaches the reward of best-of-32 soonest; of samples that
    are stopped early the level; of ReNO its learning rate.
    """
    recorded, reward = RecordedPool.load(work, "tuning"), weighted_selection(work)
    for unit in UNITS:
        prices = search_pool.costs(work, unit)
        for name, (way, *_) in WAYS.items():
            cached(work / "tuned" / f"{name}-{unit}.json", lambda n=name, w=way, c=prices: _tuned(recorded, n, w, c))
        cached(
            work / "tuned" / f"stopped-{unit}.json",
            lambda c=prices: {budget: best_level(recorded, c, budget) for budget in BUDGETS},
        )
        cached(
            work / "tuned" / f"reno-{unit}.json",
            lambda u=unit: {budget: _reno_rate(work, reward, u, budget) for budget in LIVE_BUDGETS},
        )


def _tuned(recorded: RecordedPool, name: str, way: str, prices: Costs) -> dict[str, object]:
    trials = recorded.trials(way, TRIALS)
    target = trials.reward(best_of(recorded.clean, BUDGETS[-1]))
    by_budget = {budget: asdict(trials.best(way, budget, prices)) for budget in BUDGETS}
    soonest = min(schedules(LEVELS), key=lambda schedule: cost_to_reach(trials, schedule, way, prices, target))
    print(f"{name}: {by_budget}", flush=True)
    return {"by_budget": by_budget, "soonest": asdict(soonest)}


def best_level(recorded: RecordedPool, costs: Costs, budget: int) -> int:
    """The level to stop samples at, of those at which the budget pays for no more samples than were recorded."""
    possible = [level for level in LEVELS if stopped_count(costs, level, budget) <= SEEDS]
    rewards = {level: stopped(recorded, costs, level, budget)[:, 0] for level in possible}
    return max(possible, key=lambda level: float(task_mean(rewards[level], recorded.tasks)))


def cost_to_reach(trials: Trials, schedule: PruneSchedule, way: str, costs: Costs, target: float) -> float:
    """Find the least cost at which a schedule's mean reward reaches ``target``, as a fraction of best-of-32's cost.

    It is infinite if the recorded candidates do not reach the target.
    """
    counts = range(1, trials.most + 1)
    place = bisect.bisect_left(counts, True, key=lambda n: trials.reward(trials.pruned(schedule, n)) >= target)
    if place == len(counts):
        return math.inf
    return costs.pruning(schedule, way, counts[place]) / (BUDGETS[-1] * costs.sample())


def load_schedules(work: Path, name: str, unit: str) -> tuple[dict[int, PruneSchedule], PruneSchedule]:
    """What ``tune`` chose: by budget, and to reach best-of-32."""
    values = json.loads((work / "tuned" / f"{name}-{unit}.json").read_text(encoding="utf-8"))
    by_budget = {int(budget): _schedule(plain) for budget, plain in values["by_budget"].items()}
    return by_budget, _schedule(values["soonest"])


def _schedule(plain: Mapping[str, Sequence[float]]) -> PruneSchedule:
    return PruneSchedule(tuple(map(int, plain["steps"])), tuple(plain["keep"]))


def stopped_count(costs: Costs, level: int, budget: float) -> int:
    """How many samples that are stopped at a level a budget pays for."""
    return int(budget * costs.sample() * (1 + 1e-9) / costs.sample(level + 1))


def stopped(recorded: RecordedPool, costs: Costs, level: int, budget: float) -> Tensor:
    """The ends (P, 2) of the best of as many samples, stopped at a level, as a budget pays for."""
    return best_of(recorded.stopped(level), stopped_count(costs, level, budget))


@dataclass(frozen=True)
class Curve:
    """A method at every budget.

    Attributes:
        ends: The clean scores (P, 2) by the selection reward and the verifier.
        shares: What it spends of the budget, as a fraction.
    """

    ends: Mapping[int, Tensor]
    shares: Mapping[int, float]

    @classmethod
    def of(cls, method: Method) -> Curve:
        """The results of a method at all budgets."""
        points = {budget: method(budget) for budget in BUDGETS}
        return cls({b: ends for b, (ends, _) in points.items()}, {b: share for b, (_, share) in points.items()})

    def mean(self, score: int) -> Tensor:
        """The mean (P,) of a score over all budgets but the smallest."""
        return torch.stack([self.ends[budget][:, score] for budget in BUDGETS[1:]]).mean(0)


@dataclass(frozen=True)
class Compared:
    """Methods at every budget in one unit on the prompts of a pool."""

    recorded: RecordedPool
    work: Path
    unit: str

    @property
    def costs(self) -> Costs:
        """What the calls of a search cost in this unit."""
        return search_pool.costs(self.work, self.unit)

    def methods(self) -> dict[str, list[Method]]:
        """Every method, as often as its student has seeds."""
        ends, costs = self.recorded, self.costs
        image, half = costs.sample(), costs.sample(STEPS // 2)
        looked, finish = costs.forward + costs.looks["raw"], (STEPS - 1) * costs.forward + costs.decode + costs.reward
        levels = json.loads((self.work / "tuned" / f"stopped-{self.unit}.json").read_text(encoding="utf-8"))

        def best(pool: Tensor, count: Callable[[int], int], cost: float, once: float = 0.0) -> Method:
            """The best of as many of a pool as ``count`` says, at ``cost`` each and ``once`` for the best one."""

            def method(budget: int) -> tuple[Tensor, float]:
                recorded = min(count(budget), SEEDS)
                return best_of(pool, recorded), (recorded * cost + once) / (budget * image)

            return method

        def stopped_early(budget: int) -> tuple[Tensor, float]:
            level = levels[str(budget)]
            spent = stopped_count(costs, level, budget) * costs.sample(level + 1)
            return stopped(ends, costs, level, budget), spent / (budget * image)

        single: dict[str, Method] = {
            "best_of_n": best(ends.clean, lambda budget: budget, image),
            "one_sample": best(ends.clean, lambda budget: 1, image),
            "best_of_n_half_the_steps": best(ends.half, lambda b: int(b * image * (1 + 1e-9) / half), half),
            "best_of_n_stopped_early": stopped_early,
            "best_of_n_stochastic": best(ends.stochastic, lambda budget: budget, image),
            "oracle_after_one_forward": best(
                ends.clean, lambda b: max(1, int((b * image - finish) / looked)), looked, finish
            ),
            "best_of_the_pool": best(ends.clean, lambda budget: SEEDS, image),
        }
        pruning = {name: [self._pruning(name, way) for way in ways] for name, ways in WAYS.items()}
        return {**{name: [method] for name, method in single.items()}, **pruning}

    def _pruning(self, name: str, way: str) -> Method:
        by_budget, _ = load_schedules(self.work, name, self.unit)
        trials, costs = self.recorded.trials(way, SUBSETS), self.costs

        def method(budget: int) -> tuple[Tensor, float]:
            schedule = by_budget[budget]
            return trials.at(schedule, way, budget, costs), costs.share(schedule, way, budget, trials.most)

        return method

    def curves(self) -> dict[str, list[Curve]]:
        """Every method at every budget, for each seed of its student."""
        return {name: [Curve.of(method) for method in methods] for name, methods in self.methods().items()}

    def cost_of_best_of_32(self, name: str) -> float | None:
        """The share of its cost at which pruning reaches best-of-32's reward; None if the recorded pool ends first.

        It has no interval: one from resampled prompts was not shown to cover as often as it says.
        """
        way, (_, schedule) = WAYS[name][0], load_schedules(self.work, name, self.unit)
        trials = self.recorded.trials(way, SUBSETS)
        target = trials.reward(best_of(self.recorded.clean, BUDGETS[-1]))
        reached = cost_to_reach(trials, schedule, way, self.costs, target)
        return reached if math.isfinite(reached) else None


def mean_gains(ends: Mapping[int, Tensor], start: float) -> Tensor:
    """The mean gain (P,) of each prompt's selection reward over ``start``, over budgets on a log scale.

    It is the area under the gain over log2(budget) by the trapezoid rule, divided by its width. TTSnap's paper
    integrates over a uniform grid of budgets. On budgets that double, such an integral rests almost alone on the two
    largest, and a uniform grid needs a schedule tuned at each of its budgets.
    """
    gains = torch.stack([scores[:, 0].double() for scores in ends.values()]) - start
    places = torch.tensor(list(ends), dtype=torch.float64).log2()
    area: Tensor = torch.trapezoid(gains, places, dim=0)
    return area / (places[-1] - places[0])


def budget_use(
    ends: Mapping[int, Tensor], best_of_n: Mapping[int, Tensor], tasks: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Reward and use of the budget in one measure of each prompt (P,): of best-of-N, and of a method.

    It is the mean gain over best-of-N's mean reward at the least budget, in units of best-of-N's own mean. The mean
    difference stands for what TTSnap's code calls omega (see ``mean_gains``): 0.25 says that a method gains a quarter
    more reward over the budgets.

    Args:
        ends: Clean scores (P, 2) of the method by budget, ascending.
        best_of_n: Those of best-of-N.
        tasks: The tasks of the prompts, which have equal weights in the means.
    """
    start = float(task_mean(best_of_n[min(best_of_n)][:, 0], tasks))
    reference = mean_gains(best_of_n, start)
    unit = task_mean(reference, tasks)
    return reference / unit, mean_gains(ends, start) / unit


def alignment(recorded: RecordedPool) -> dict[str, dict[int, float]]:
    """Mean Kendall's tau of previews' scores with the clean reward, by way and step."""
    tasks = {task: [row for row, own in enumerate(recorded.tasks) if own == task] for task in recorded.tasks}

    def tau(scores: Tensor, clean: Tensor) -> float:
        """Its mean over the prompts of scores (P, N)."""
        prompt = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
        return ranking_quality(scores.flatten(), clean.flatten(), prompt, 0.0).tau

    return {
        way: {
            step: mean(tau(recorded.look(way)[rows, :, place], recorded.clean[rows, :, 0]) for rows in tasks.values())
            for place, step in enumerate(LEVELS)
        }
        for way in ("raw", *STUDENTS)
    }


def weighted_selection(work: Path) -> NamedReward:
    """The selection reward, with one over its standard deviation among samples of a prompt as its weight.

    So learning rates of ReNO mean the same as in ``steering_table.py``.
    """
    recorded = RecordedPool.load(work, "tuning")
    spread = float(task_mean(recorded.clean[:, :, 0].std(dim=1), recorded.tasks))
    return replace(search_pool.selection(work), weight=1 / max(spread, 1e-6))


def live_strategies(work: Path, unit: str, budget: int, student: str) -> dict[str, Strategy]:
    """What is searched live: ReNO by itself, and from the noise that another search found with half the budget."""
    rate = json.loads((work / "tuned" / f"reno-{unit}.json").read_text(encoding="utf-8"))[str(budget)]

    def pruning(name: str, at: int) -> Prune:
        schedule = load_schedules(work, name, unit)[0][at]
        scorer = None if name == "raw_pruning" else search_pool.scorer(work, student)
        return Prune(schedule.steps, schedule.keep, scorer=scorer)

    def reno(first: Strategy | None = None) -> ReNO:
        return ReNO(learning_rate=rate, initial_search=first)

    return {
        "best_of_n": BestOfN(),
        "raw_pruning": pruning("raw_pruning", budget),
        "noise_aware_pruning": pruning("noise_aware_pruning", budget),
        "reno": reno(),
        "best_of_n_then_reno": reno(BestOfN()),
        "raw_pruning_then_reno": reno(pruning("raw_pruning", budget // 2)),
        "noise_aware_pruning_then_reno": reno(pruning("noise_aware_pruning", budget // 2)),
    }


def searched(
    reward: NamedReward, strategy: Strategy, budget: Budget, prompts: Sequence[Prompt], seed: str
) -> dict[str, Any]:
    """Search prompts together: the scores of the best sample of each, and what one took on average.

    That is seconds of wall-clock, NFE with two for a backward pass, and the share of the budget that was spent.
    """
    model, judge = search_pool.pipeline(), search_pool.judge()
    run = SearchRun(model, prompts, [reward], Sampling(STEPS).grid(model), 1.0, SEEDS, seed)
    started = time.perf_counter()
    finished = strategy(run, budget)
    seconds = time.perf_counter() - started
    best = finished.rows(finished.best())
    strict = judge.function(best.samples, [prompts[p] for p in best.candidates.prompt.tolist()])
    scores = torch.stack([best.scores[:, 0], strict], dim=1)
    return {
        "scores": scores.tolist(),
        "seconds": seconds / len(prompts),
        "nfe": Budget(nfe=1.0).spent(run.ledger) / len(prompts),
        "share": budget.spent(run.ledger) / len(prompts) / budget.limit,
    }


def _budget(work: Path, unit: str, samples: int) -> Budget:
    if unit == "nfe":
        return Budget(nfe=float(samples * STEPS))
    prices = search_pool.prices(work)
    prices["reward/noise-aware"] = prices["reward/decoded"]
    return Budget(cost=samples * search_pool.costs(work, unit).sample(), prices=prices)


def _reno_rate(work: Path, reward: NamedReward, unit: str, budget: int) -> float:
    """The learning rate of most reward on some tuning prompts at a budget."""
    prompts = POOLS["tuning"].prompts[:RENO_TUNING]
    limit = _budget(work, unit, budget)

    def reached(rate: float) -> float:
        scores = torch.tensor(searched(reward, ReNO(learning_rate=rate), limit, prompts, "tuning")["scores"])
        average = float(task_mean(scores[:, 0], [prompt.task for prompt in prompts]))
        print(f"ReNO at {rate}, {budget} samples' {unit}: {average:.3f}", flush=True)
        return average

    return max(RENO_RATES, key=reached)


def live(work: Path) -> None:
    """Search live on the base model at the budgets in both units; chunks that are done already are skipped."""
    reward, prompts = weighted_selection(work), LIVE.prompts
    for seed, unit, budget in itertools.product(LIVE_SEEDS, UNITS, LIVE_BUDGETS):
        strategies = live_strategies(work, unit, budget, f"decoded-{seed}")
        for first, (name, strategy) in itertools.product(range(0, len(prompts), CHUNK), strategies.items()):
            part = prompts[first : first + CHUNK]
            limit = _budget(work, unit, budget)
            cached(
                live_path(work, seed, unit, budget, name, first),
                lambda s=strategy, b=limit, p=part, n=f"live/{seed}/{first}": searched(reward, s, b, p, n),
            )
            print(f"seed {seed}, {budget} samples' {unit}, {name}: {first + len(part)}/{len(prompts)}", flush=True)


def live_path(work: Path, seed: int, unit: str, budget: int, name: str, first: int) -> Path:
    """The file that a live search is written to."""
    return work / "live" / f"{name}-{unit}-{budget}-{seed}-{first:03d}.json"


def publish(work: Path) -> None:
    """Everything on the test prompts, from the pools and the live searches."""
    extra: dict[str, Any] = {"budgets": BUDGETS, "tolerance": TOLERANCE}
    records: list[PromptRecord] = []
    base = RecordedPool.load(work, "base")
    for unit, suffix in zip(UNITS, ("", ".nfe"), strict=True):
        compared = Compared(base, work, unit)
        curves = compared.curves()
        records += _pool_records(base, curves, suffix)
        means = {
            name: {
                budget: task_mean(torch.stack([curve.ends[budget] for curve in seeds]).mean(0), base.tasks).tolist()
                for budget in BUDGETS
            }
            for name, seeds in curves.items()
        }
        shares = {name: seeds[0].shares for name, seeds in curves.items()}  # a student's seeds cost the same
        reached = {name: compared.cost_of_best_of_32(name) for name in WAYS}
        extra |= {f"curves{suffix}": means, f"shares{suffix}": shares, f"cost_of_best_of_32{suffix}": reached}
        records += _tuned_records(work, unit, suffix)
        records += _live_records(work, unit, suffix)
    extra["live"] = live_table(work)
    extra["alignment"] = alignment(base)
    extra["prices"] = asdict(search_pool.costs(work, "seconds"))
    extra["schedules"] = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((work / "tuned").glob("*.json"))
    }
    claim = (
        "Searches by a reward that has only seen clean images: pruning by the reward itself and by its noise-aware"
        " students, beside best-of-N at equal seconds and at equal NFE (suite comp)"
    )
    command = "python scripts/benchmarks/benchmark.py search"
    write_results(RESULTS, "search_shapes", {**head(claim, command), **extra}, records)


def _pool_records(recorded: RecordedPool, curves: Mapping[str, list[Curve]], suffix: str) -> list[PromptRecord]:
    """Best-of-N before and every method after: the use of the budget, means over budgets, and the claimed at each."""
    (reference,), records = curves["best_of_n"], []
    for name, seeds in curves.items():
        for number, curve in enumerate(seeds if name != "best_of_n" else []):
            seed = 11 + number if len(seeds) > 1 else 0
            before, after = budget_use(curve.ends, reference.ends, recorded.tasks)
            about = f"mean gain of the selection reward over log2 of budgets 2 to 32, best-of-N's is 1{_in(suffix)}"
            records += _records(f"{name}.omega{suffix}", about, seed, recorded, before, after)
            for score, (end, metric) in enumerate((("", "selection reward"), (".strict", "strict"))):
                about = f"{metric}, budgets 4 to 32{_in(suffix)}"
                pair = reference.mean(score), curve.mean(score)
                records += _records(f"{name}{end}{suffix}", about, seed, recorded, *pair)
            for budget in BUDGETS if name in CLAIMED else ():
                pair = reference.ends[budget][:, 0], curve.ends[budget][:, 0]
                about = f"selection reward{_in(suffix)}"
                records += _records(f"{name}.at_{budget}{suffix}", about, seed, recorded, *pair)
    raw = curves["raw_pruning"][0]
    for number, curve in enumerate(curves["noise_aware_pruning"]):
        about = f"selection reward over raw pruning, budgets 4 to 32{_in(suffix)}"
        name = f"noise_aware_over_raw_pruning{suffix}"
        records += _records(name, about, 11 + number, recorded, raw.mean(0), curve.mean(0))
    return records


def _in(suffix: str) -> str:
    return ", in NFE" if suffix else ""


def _records(
    name: str, metric: str, seed: int, recorded: RecordedPool, before: Iterable[Tensor], after: Iterable[Tensor]
) -> list[PromptRecord]:
    return [
        PromptRecord(name, metric, seed, recorded.tasks[row], recorded.texts[row], float(old), float(new), SUBSETS)
        for row, (old, new) in enumerate(zip(before, after, strict=True))
    ]


def _tuned_records(work: Path, unit: str, suffix: str) -> list[PromptRecord]:
    """On the tuned models, by the base's students and schedules: best-of-N before, pruning after."""
    records = []
    tuned = [(name, source.seed) for name, source in POOLS.items() if source.seed is not None]
    for number, (pool, seed) in enumerate(tuned):
        recorded = RecordedPool.load(work, pool)
        curves = Compared(recorded, work, unit).curves()
        (reference,) = curves["best_of_n"]
        for name in ("one_sample", "best_of_n_half_the_steps", *CLAIMED):
            curve = curves[name][number % len(curves[name])]
            for score, (end, metric) in enumerate((("", "selection reward"), (".strict", "strict"))):
                about = f"{metric}, budgets 4 to 32, on a tuned model{_in(suffix)}"
                pair = reference.mean(score), curve.mean(score)
                records += _records(f"tuned_{name}{end}{suffix}", about, seed, recorded, *pair)
    return records


def _live_records(work: Path, unit: str, suffix: str) -> list[PromptRecord]:
    """Live searches: best-of-N before, every other after."""
    records = []
    for seed, budget in itertools.product(LIVE_SEEDS, LIVE_BUDGETS):
        names = list(live_strategies(work, unit, budget, STUDENTS[0]))
        rows = {name: _live_rows(work, seed, unit, budget, name) for name in names}
        for name, (score, metric) in itertools.product(names[1:], enumerate(("selection reward", "strict"))):
            end = ".strict" if score else ""
            row = f"live_{name}.at_{budget}{end}{suffix}"
            about = f"{metric}, live at {budget} samples' cost{_in(suffix)}"
            for prompt, old, new in zip(LIVE.prompts, rows["best_of_n"], rows[name], strict=True):
                pair = old["scores"][score], new["scores"][score]
                records.append(PromptRecord(row, about, seed, prompt.task, prompt.text, *pair, 1))
    return records


def live_table(work: Path) -> list[dict[str, Any]]:
    """Every live search at every budget: the mean scores of what it found, and what a prompt took."""
    table = []
    tasks = [prompt.task for prompt in LIVE.prompts] * len(LIVE_SEEDS)
    for unit, budget in itertools.product(UNITS, LIVE_BUDGETS):
        for name in live_strategies(work, unit, budget, STUDENTS[0]):
            rows = [row for seed in LIVE_SEEDS for row in _live_rows(work, seed, unit, budget, name)]
            selection, strict = task_mean(torch.tensor([row["scores"] for row in rows]).double(), tasks).tolist()
            cost = {key: mean(row[key] for row in rows) for key in ("nfe", "seconds", "share")}
            scores = {"selection": selection, "strict": strict}
            table.append({"search": name, "unit": unit, "budget": budget, "scores": scores, **cost})
    return table


def _live_rows(work: Path, seed: int, unit: str, budget: int, name: str) -> list[dict[str, Any]]:
    """What ``searched`` says of each prompt. Exits where a chunk is missing."""
    paths = [live_path(work, seed, unit, budget, name, first) for first in range(0, len(LIVE.prompts), CHUNK)]
    if missing := [path.name for path in paths if not path.exists()]:
        raise SystemExit(f"live searches are missing, such as {missing[0]}: run search first")
    chunks = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [chunk | {"scores": scores} for chunk in chunks for scores in chunk["scores"]]


PARTS: dict[str, Callable[[Path], None]] = {
    "prepare": prepare,
    "prices": search_pool.measure,
    "record": search_pool.record,
    "tune": tune,
    "search": live,
    "publish": publish,
}


def run_parts(names: Iterable[str], work: Path) -> None:
    """Run some parts in a folder. Exits where it was made with another base."""
    require_base(work, "shapes-sd3")
    for name in names:
        PARTS[name](work)
