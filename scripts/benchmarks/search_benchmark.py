"""Noise-aware pruning (TTSnap) beside other searches at equal cost in the shapes world.

    prepare     the selection reward, trained on clean images alone, and its noise-aware students
    prices      what every call costs here, on a quiet machine
    record      pools of trajectories of the base and of models that Flow-GRPO tuned, scored in every way
    tune        schedules on every second prompt, in seconds and in NFE; the learning rate of ReNO on some of them
    search      live searches with ReNO, by itself and after best-of-N and pruning
    publish     curves and claims, on the other prompts

The selection reward is a regressor on shapes-clip; the verifier only judges. A budget is so many samples' cost, in
seconds or in NFE. Every part resumes; the pools need the models of ``scripts/benchmarks/proofs.py methods``.
"""

from __future__ import annotations

import bisect
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from genalign.diffusion.sampling import Sampling
from genalign.evaluation.records import PromptRecord
from genalign.reward_learning.noise_aware import ranking_quality
from genalign.scoring.budget import Budget
from genalign.search import BestOfN, Prune, ReNO
from genalign.search.engine import SearchRun
from genalign.search.pruning import PruneSchedule
from genalign.search.strategy import Strategy
from genalign.types import Prompt
from scripts.benchmarks import search_pool
from scripts.benchmarks.cached import cached
from scripts.benchmarks.pruning_trials import Costs, Trials, best_of, schedules
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.search_pool import LEVELS, SEEDS, STEPS, STUDENTS, TEST, TUNE, TUNED, RecordedPool
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
LIVE_BUDGETS, LIVE_PROMPTS, LIVE_SEEDS, CHUNK = (8, 32), 60, (11, 12, 13), 12
RENO_RATES, RENO_TUNING = (1.0, 5.0, 20.0), 24

Method = Callable[[int], Tensor]
"""From a budget to the clean scores (P, 2) by the selection reward and the verifier."""


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
    recorded = RecordedPool.load(work / "pool" / "base", TUNE)
    for unit in UNITS:
        prices = search_pool.costs(work, unit)
        for name, (way, *_) in WAYS.items():
            cached(work / "tuned" / f"{name}-{unit}.json", lambda n=name, w=way, c=prices: _tuned(recorded, n, w, c))
        cached(
            work / "tuned" / f"stopped-{unit}.json",
            lambda c=prices: {
                b: max(LEVELS, key=lambda level: float(stopped(recorded, c, level, b)[:, 0].mean())) for b in BUDGETS
            },
        )
    cached(work / "tuned" / "reno.json", lambda: _reno_rate(work))


def _tuned(recorded: RecordedPool, name: str, way: str, prices: Costs) -> dict[str, object]:
    trials, target = recorded.trials(way, TRIALS), float(best_of(recorded.clean, BUDGETS[-1])[:, 0].mean())
    by_budget = {budget: asdict(trials.best(way, budget, prices)) for budget in BUDGETS}
    soonest = min(schedules(LEVELS), key=lambda schedule: share(trials, schedule, way, prices, target))
    print(f"{name}: {by_budget}", flush=True)
    return {"by_budget": by_budget, "soonest": asdict(soonest)}


def share(trials: Trials, schedule: PruneSchedule, way: str, costs: Costs, target: float) -> float:
    """Find the least cost at which a schedule's mean reward reaches ``target``, as a fraction of best-of-32's cost.

    It is infinite if the recorded candidates do not reach the target.
    """
    counts = range(1, trials.most + 1)
    place = bisect.bisect_left(counts, True, key=lambda n: float(trials.pruned(schedule, n)[:, 0].mean()) >= target)
    if place == len(counts):
        return float(np.inf)
    return costs.pruning(schedule, way, counts[place]) / (BUDGETS[-1] * costs.sample())


def load_schedules(work: Path, name: str, unit: str) -> tuple[dict[int, PruneSchedule], PruneSchedule]:
    """What ``tune`` chose: by budget, and to reach best-of-32."""
    values = json.loads((work / "tuned" / f"{name}-{unit}.json").read_text(encoding="utf-8"))
    by_budget = {int(budget): _schedule(plain) for budget, plain in values["by_budget"].items()}
    return by_budget, _schedule(values["soonest"])


def _schedule(plain: Mapping[str, Sequence[float]]) -> PruneSchedule:
    return PruneSchedule(tuple(map(int, plain["steps"])), tuple(plain["keep"]))


def stopped(recorded: RecordedPool, costs: Costs, level: int, budget: float) -> Tensor:
    """The ends (P, 2) of the best of as many samples, stopped at a level, as a budget pays for."""
    return best_of(recorded.stopped(level), int(budget * costs.sample() * (1 + 1e-9) / costs.sample(level + 1)))


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
        image = costs.sample()
        levels = json.loads((self.work / "tuned" / f"stopped-{self.unit}.json").read_text(encoding="utf-8"))

        def first(budget: int) -> Tensor:
            looked = costs.forward + costs.looks["raw"]
            possible = int((budget * image - (STEPS - 1) * costs.forward - looked) / looked)
            return best_of(ends.clean, max(1, possible))

        single: dict[str, Method] = {
            "best_of_n": lambda budget: best_of(ends.clean, budget),
            "one_sample": lambda budget: best_of(ends.clean, 1),
            "best_of_n_half_the_steps": lambda budget: best_of(
                ends.half, int(budget * image * (1 + 1e-9) / costs.sample(STEPS // 2))
            ),
            "best_of_n_stopped_early": lambda budget: stopped(ends, costs, levels[str(budget)], budget),
            "best_of_n_stochastic": lambda budget: best_of(ends.stochastic, budget),
            "oracle_after_one_forward": first,
            "best_of_the_pool": lambda budget: best_of(ends.clean, SEEDS),
        }
        pruning = {name: [self._pruning(name, way) for way in ways] for name, ways in WAYS.items()}
        return {**{name: [method] for name, method in single.items()}, **pruning}

    def _pruning(self, name: str, way: str) -> Method:
        by_budget, _ = load_schedules(self.work, name, self.unit)
        trials, costs = self.recorded.trials(way, SUBSETS), self.costs
        return lambda budget: trials.at(by_budget[budget], way, budget, costs)

    def curves(self) -> dict[str, list[dict[int, Tensor]]]:
        """The ends (P, 2) of every method at every budget, for each seed of its student."""
        return {
            name: [{budget: method(budget) for budget in BUDGETS} for method in methods]
            for name, methods in self.methods().items()
        }

    def cost_of_best_of_32(self, name: str) -> float | None:
        """The share of its cost at which pruning reaches best-of-32's reward; None if the recorded pool ends first.

        It has no interval: one from resampled prompts was not shown to cover as often as it says.
        """
        way, (_, schedule) = WAYS[name][0], load_schedules(self.work, name, self.unit)
        target = float(best_of(self.recorded.clean, BUDGETS[-1])[:, 0].mean())
        reached = share(self.recorded.trials(way, SUBSETS), schedule, way, self.costs, target)
        return reached if np.isfinite(reached) else None


def areas(curve: Mapping[int, Tensor], start: float) -> Tensor:
    """The area (P,) between the selection reward of each prompt and ``start``, over the budgets, by Simpson's rule."""
    rewards = torch.stack([curve[budget][:, 0] for budget in curve]) - start
    area: Tensor = torch.from_numpy(scipy.integrate.simpson(rewards.numpy(), x=np.array(list(curve)), axis=0))
    return area


def budget_use(curve: Mapping[int, Tensor], best_of_n: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """TTSnap's measure of reward and budget together, of each prompt (P,): of best-of-N, and of a method.

    It is the area over best-of-N's mean reward at the least budget, in units of the mean area of best-of-N. The mean
    difference is what TTSnap's code calls omega: 0.25 says that a method gains a quarter more reward over the budgets.
    """
    start = float(best_of_n[min(best_of_n)][:, 0].mean())
    reference = areas(best_of_n, start)
    unit = reference.mean()
    return reference / unit, areas(curve, start) / unit


def alignment(recorded: RecordedPool) -> dict[str, dict[int, float]]:
    """Mean Kendall's tau of previews' scores with the clean reward, by way and step."""
    count, candidates = recorded.clean.shape[:2]
    prompt, clean = torch.arange(count).repeat_interleave(candidates), recorded.clean[..., 0].flatten()
    return {
        way: {
            step: ranking_quality(recorded.look(way)[:, :, place].flatten(), clean, prompt, 0.0).tau
            for place, step in enumerate(LEVELS)
        }
        for way in ("raw", *STUDENTS)
    }


def live_strategies(work: Path, unit: str, budget: int, student: str, rate: float) -> dict[str, Strategy]:
    """What is searched live: ReNO by itself, and from the noise that another search found with half the budget."""

    def pruning(name: str, at: int) -> Prune:
        schedule = load_schedules(work, name, unit)[0][at]
        scorer = None if name == "raw_pruning" else search_pool.scorer(work, student)
        return Prune(schedule.steps, schedule.keep, scorer=scorer)

    return {
        "best_of_n": BestOfN(),
        "raw_pruning": pruning("raw_pruning", budget),
        "noise_aware_pruning": pruning("noise_aware_pruning", budget),
        "reno": ReNO(learning_rate=rate),
        "best_of_n_then_reno": ReNO(learning_rate=rate, initial_search=BestOfN()),
        "raw_pruning_then_reno": ReNO(learning_rate=rate, initial_search=pruning("raw_pruning", budget // 2)),
        "noise_aware_pruning_then_reno": ReNO(
            learning_rate=rate, initial_search=pruning("noise_aware_pruning", budget // 2)
        ),
    }


def searched(work: Path, strategy: Strategy, budget: Budget, prompts: Sequence[Prompt], seed: str) -> dict[str, Any]:
    """The scores of the best sample of each prompt of one search, and what it took: seconds and NFE of a prompt."""
    model, judge = search_pool.pipeline(), search_pool.judge()
    grid = Sampling(STEPS).grid(model)
    run = SearchRun(model, prompts, [search_pool.selection(work)], grid, 1.0, SEEDS, seed)
    started = time.perf_counter()
    finished = strategy(run, budget)
    seconds = time.perf_counter() - started
    best = finished.rows(finished.best())
    strict = judge.function(best.samples, [prompts[p] for p in best.candidates.prompt.tolist()])
    spent = Budget(nfe=1.0).spent(run.ledger)
    scores = torch.stack([best.scores[:, 0], strict], dim=1)
    return {"scores": scores.tolist(), "seconds": seconds / len(prompts), "nfe": spent / len(prompts)}


def _budget(work: Path, unit: str, samples: int) -> Budget:
    if unit == "nfe":
        return Budget(nfe=float(samples * STEPS))
    prices = search_pool.prices(work)
    prices["reward/noise-aware"] = prices["reward/decoded"]
    return Budget(cost=samples * search_pool.costs(work, unit).sample(), prices=prices)


def _reno_rate(work: Path) -> float:
    """The learning rate of most reward on some tuning prompts, in seconds at the larger budget."""
    rows = list(TUNE)[:RENO_TUNING]
    prompts = [search_pool.prompts()[row] for row in rows]

    def reward(rate: float) -> float:
        result = searched(work, ReNO(learning_rate=rate), _budget(work, "seconds", LIVE_BUDGETS[-1]), prompts, "tuning")
        mean = float(torch.tensor(result["scores"])[:, 0].mean())
        print(f"ReNO at {rate}: {mean:.3f}", flush=True)
        return mean

    return max(RENO_RATES, key=reward)


def live(work: Path) -> None:
    """Search live on the base model at the budgets in both units; chunks that are done already are skipped."""
    rate = json.loads((work / "tuned" / "reno.json").read_text(encoding="utf-8"))
    prompts = [search_pool.prompts()[row] for row in TEST][:LIVE_PROMPTS]
    for seed, unit, budget in itertools.product(LIVE_SEEDS, UNITS, LIVE_BUDGETS):
        strategies = live_strategies(work, unit, budget, f"decoded-{seed}", rate)
        for first, (name, strategy) in itertools.product(range(0, LIVE_PROMPTS, CHUNK), strategies.items()):
            part = prompts[first : first + CHUNK]
            limit = _budget(work, unit, budget)
            cached(
                live_path(work, seed, unit, budget, name, first),
                lambda s=strategy, b=limit, p=part, n=f"live/{seed}/{first}": searched(work, s, b, p, n),
            )
            print(f"seed {seed}, {budget} samples' {unit}, {name}: {first + len(part)}/{LIVE_PROMPTS}", flush=True)


def live_path(work: Path, seed: int, unit: str, budget: int, name: str, first: int) -> Path:
    """The file that a live search is written to."""
    return work / "live" / f"{name}-{unit}-{budget}-{seed}-{first:03d}.json"


def publish(work: Path) -> None:
    """Everything on the test prompts, from the pools and the live searches."""
    extra: dict[str, Any] = {"budgets": BUDGETS}
    records: list[PromptRecord] = []
    base = RecordedPool.load(work / "pool" / "base", TEST)
    for unit, suffix in zip(UNITS, ("", ".nfe"), strict=True):
        compared = Compared(base, work, unit)
        curves = compared.curves()
        records += _pool_records(base, curves, suffix)
        key = "curves" if unit == "seconds" else "curves_by_nfe"
        extra[key] = {
            name: {budget: torch.stack([curve[budget] for curve in seeds]).mean((0, 1)).tolist() for budget in BUDGETS}
            for name, seeds in curves.items()
        }
        key = "cost_of_best_of_32" if unit == "seconds" else "forwards_of_best_of_32"
        extra[key] = {name: compared.cost_of_best_of_32(name) for name in WAYS}
        records += _tuned_records(work, unit, suffix)
        records += _live_records(work, unit, suffix)
    extra["alignment"] = alignment(base)
    extra["prices"] = asdict(search_pool.costs(work, "seconds"))
    extra["schedules"] = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((work / "tuned").glob("*.json"))
    }
    claim = (
        "Noise-aware pruning by a self-distilled reward that has only seen clean images finds more of it than best-of-N"
        " and pruning by the reward itself, at equal seconds and at equal NFE (suite comp)"
    )
    command = "python scripts/benchmarks/benchmark.py search"
    write_results(RESULTS, "search_shapes", {**head(claim, command), **extra}, records)


def _pool_records(
    recorded: RecordedPool, curves: Mapping[str, list[dict[int, Tensor]]], suffix: str
) -> list[PromptRecord]:
    """Best-of-N before and every method after: TTSnap's measure, means over budgets, and the claimed ones at each."""
    (reference,), records = curves["best_of_n"], []
    for name, seeds in curves.items():
        for number, curve in enumerate(seeds if name != "best_of_n" else []):
            seed = 11 + number if len(seeds) > 1 else 0
            before, after = budget_use(curve, reference)
            about = f"area of the selection reward over budgets 2 to 32, best-of-N's is 1{_in(suffix)}"
            records += _records(f"{name}.omega{suffix}", about, seed, recorded, before, after)
            for score, (end, metric) in enumerate((("", "selection reward"), (".strict", "strict"))):
                mean = [torch.stack([c[b][:, score] for b in BUDGETS[1:]]).mean(0) for c in (reference, curve)]
                records += _records(
                    f"{name}{end}{suffix}", f"{metric}, budgets 4 to 32{_in(suffix)}", seed, recorded, *mean
                )
            for budget in BUDGETS if name in CLAIMED else ():
                pair = [c[budget][:, 0] for c in (reference, curve)]
                records += _records(
                    f"{name}.at_{budget}{suffix}", f"selection reward{_in(suffix)}", seed, recorded, *pair
                )
    raw = curves["raw_pruning"][0]
    for number, curve in enumerate(curves["noise_aware_pruning"]):
        mean = [torch.stack([c[b][:, 0] for b in BUDGETS[1:]]).mean(0) for c in (raw, curve)]
        about = f"selection reward over raw pruning, budgets 4 to 32{_in(suffix)}"
        records += _records(f"noise_aware_over_raw_pruning{suffix}", about, 11 + number, recorded, *mean)
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
    rows = list(TEST)[: search_pool.TUNED_PROMPTS]
    for number, seed in enumerate(TUNED):
        recorded = RecordedPool.load(work / "pool" / f"tuned-{seed}", rows)
        curves = Compared(recorded, work, unit).curves()
        (reference,) = curves["best_of_n"]
        for name in ("one_sample", "best_of_n_half_the_steps", *CLAIMED):
            curve = curves[name][number % len(curves[name])]
            for score, (end, metric) in enumerate((("", "selection reward"), (".strict", "strict"))):
                mean = [torch.stack([c[b][:, score] for b in BUDGETS[1:]]).mean(0) for c in (reference, curve)]
                about = f"{metric}, budgets 4 to 32, on a tuned model{_in(suffix)}"
                records += _records(f"tuned_{name}{end}{suffix}", about, seed, recorded, *mean)
    return records


def _live_records(work: Path, unit: str, suffix: str) -> list[PromptRecord]:
    """Live searches: best-of-N before, every other after."""
    prompts = [search_pool.prompts()[row] for row in TEST][:LIVE_PROMPTS]
    names = list(live_strategies(work, unit, LIVE_BUDGETS[0], STUDENTS[0], RENO_RATES[0]))
    records = []
    for seed, budget in itertools.product(LIVE_SEEDS, LIVE_BUDGETS):
        scores = {name: _live_scores(work, seed, unit, budget, name) for name in names}
        for name, (score, metric) in itertools.product(names[1:], enumerate(("selection reward", "strict"))):
            end = ".strict" if score else ""
            about = f"{metric}, live at {budget} samples' cost{_in(suffix)}"
            records += [
                PromptRecord(
                    f"live_{name}.at_{budget}{end}{suffix}",
                    about,
                    seed,
                    prompt.task,
                    prompt.text,
                    old[score],
                    new[score],
                    1,
                )
                for prompt, old, new in zip(prompts, scores["best_of_n"], scores[name], strict=True)
            ]
    return records


def _live_scores(work: Path, seed: int, unit: str, budget: int, name: str) -> list[list[float]]:
    paths = [live_path(work, seed, unit, budget, name, first) for first in range(0, LIVE_PROMPTS, CHUNK)]
    if missing := [path.name for path in paths if not path.exists()]:
        raise SystemExit(f"live searches are missing, such as {missing[0]}: run search first")
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["scores"]]


PARTS: dict[str, Callable[[Path], None]] = {
    "prepare": prepare,
    "prices": search_pool.measure,
    "record": search_pool.record,
    "tune": tune,
    "search": live,
    "publish": publish,
}
