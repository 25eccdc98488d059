"""Search at equal cost in the shapes world, from one recorded pool of trajectories.

    prepare     the selection reward and its noise-aware students
    prices      what every call costs here
    record      the pool: previews of every trajectory, scored in every way
    tune        schedules, on every second prompt
    search      live searches over the base and the models that Flow-GRPO tuned (scripts/benchmarks/proofs.py methods)
    publish     curves and claims, on the other prompts

The selection reward is a regressor on shapes-clip; the verifier only judges. A budget is so many images' cost.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genalign.cli.main import main as genalign
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE
from genalign.evaluation.records import PromptRecord
from genalign.runtime.files import write_json, write_text
from genalign.scoring.budget import Budget
from genalign.search import BestOfN, FKSteering, Prune
from genalign.search.engine import SearchRun
from genalign.search.pruning import PruneSchedule
from genalign.search.strategy import Strategy
from rewards.noise_aware import load_scorer
from scripts.benchmarks import search_pool
from scripts.benchmarks.proofs import RESULTS, head
from scripts.benchmarks.pruning_trials import Costs, Trials, best_of, schedules
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.search_pool import FORWARDS_ALONE, LEVELS, PROMPTS, SEEDS, STEPS, RecordedPool

BUDGETS = (2, 4, 8, 16, 32)
WAYS = {
    "raw_pruning": "raw",
    "noise_aware_pruning": "decoded",
    "noise_aware_latent_pruning": "latent",
    "random_pruning": "random",
    "oracle_pruning": "oracle",
}
CLAIMED = ("noise_aware_pruning", "noise_aware_latent_pruning")
TUNE, TEST = range(0, PROMPTS, 2), range(1, PROMPTS, 2)
TRIALS, SUBSETS = 8, 40
LIVE_BUDGET, LIVE_PROMPTS, TUNED = 8, 60, (41, 42, 43)


def prepare(work: Path) -> None:
    """Train the selection reward, then students of it that look at images and at latents."""
    for name in ("selection", "decoded", "latent"):
        output = work / name
        if (output / "scorer.safetensors").exists():
            continue
        config = f"scripts/configs/noise_aware/shapes_{name}.yaml"
        if status := genalign(["train-noise-aware", "--config", config, "--output", str(output)]):
            raise SystemExit(f"{config} ended with status {status}")


def tune(work: Path) -> None:
    """For every way and budget the schedule of most reward; for every way the one that reaches best-of-32 soonest."""
    recorded, costs = RecordedPool.load(work).part(TUNE), search_pool.costs(work)
    target = float(best_of(recorded.clean, BUDGETS[-1])[:, 0].mean())
    schedules_json: dict[str, dict[str, object]] = {}
    for name, way in WAYS.items():
        trials = recorded.trials(way, TRIALS)
        by_budget = {budget: trials.best(way, budget, costs) for budget in BUDGETS}
        soonest = min(schedules(LEVELS), key=lambda schedule: share(trials, schedule, way, costs, target))
        schedules_json[name] = {"by_budget": {b: asdict(s) for b, s in by_budget.items()}, "soonest": asdict(soonest)}
        print(f"{name}: {schedules_json[name]}", flush=True)
    write_json(work / "schedules.json", schedules_json)


def share(trials: Trials, schedule: PruneSchedule, way: str, costs: Costs, target: float) -> float:
    """Find the least cost at which a schedule's mean reward reaches ``target``, as a fraction of best-of-32's cost.

    It is infinite if the recorded candidates do not reach the target.
    """
    counts = range(1, SEEDS + 1)
    values = bisect.bisect_left(counts, True, key=lambda n: float(trials.pruned(schedule, n)[:, 0].mean()) >= target)
    return costs.pruning(schedule, way, counts[values]) / (BUDGETS[-1] * costs.sample()) if values < SEEDS else np.inf


def load_schedules(work: Path, name: str) -> tuple[dict[int, PruneSchedule], PruneSchedule]:
    """What ``tune`` chose: by budget, and to reach best-of-32."""
    values = json.loads((work / "schedules.json").read_text(encoding="utf-8"))[name]
    by_budget = {int(budget): _schedule(plain) for budget, plain in values["by_budget"].items()}
    return by_budget, _schedule(values["soonest"])


def _schedule(plain: Mapping[str, Sequence[float]]) -> PruneSchedule:
    return PruneSchedule(tuple(map(int, plain["steps"])), tuple(plain["keep"]))


@dataclass(frozen=True)
class Compared:
    """Methods at every budget on the test prompts, each (P, 2)."""

    recorded: RecordedPool
    costs: Costs
    work: Path

    def methods(self) -> dict[str, Callable[[int], Tensor]]:
        """From a budget to clean scores."""
        ends, costs = self.recorded, self.costs
        image = costs.sample()

        def half(budget: int) -> Tensor:
            return best_of(ends.half, int(budget * image / costs.sample(STEPS // 2)))

        def first(budget: int) -> Tensor:
            looked = costs.forward + costs.looks["raw"]
            return best_of(ends.clean, int((budget * image - (STEPS - 1) * costs.forward - looked) / looked))

        return {
            "best_of_n": lambda budget: best_of(ends.clean, budget),
            "one_sample": lambda budget: best_of(ends.clean, 1),
            "best_of_n_half_the_steps": half,
            "best_of_n_stochastic": lambda budget: best_of(ends.stochastic, budget),
            **{name: self._pruning(name, way) for name, way in WAYS.items()},
            "oracle_after_one_forward": first,
            "best_of_the_pool": lambda budget: best_of(ends.clean, SEEDS),
        }

    def _pruning(self, name: str, way: str) -> Callable[[int], Tensor]:
        by_budget, _ = load_schedules(self.work, name)
        trials = self.recorded.trials(way, SUBSETS)

        return lambda budget: trials.at(by_budget[budget], way, budget, self.costs)

    def cost_of_best_of_32(self, name: str) -> float | None:
        """The share of its cost at which pruning reaches best-of-32's reward; None if the recorded pool ends first.

        It has no interval: one from resampled prompts was not shown to cover as often as it says.
        """
        way, (_, schedule) = WAYS[name], load_schedules(self.work, name)
        counts, trials = range(1, SEEDS + 1), self.recorded.trials(way, SUBSETS)
        rewards = torch.stack([trials.pruned(schedule, n)[:, 0] for n in counts]).mean(1)
        reached = (rewards >= best_of(self.recorded.clean, BUDGETS[-1])[:, 0].mean()).tolist()
        if True not in reached:
            return None
        return self.costs.pruning(schedule, way, counts[reached.index(True)]) / (BUDGETS[-1] * self.costs.sample())


def live(work: Path) -> None:
    """Best-of-N, pruning and FK steering at one budget, on the base and on what Flow-GRPO made of it."""
    costs, prices = search_pool.costs(work), json.loads((work / "prices.json").read_text(encoding="utf-8"))
    prices["reward/noise-aware"] = prices["reward/decoded"]
    prices["reward/strict"] = 0.0  # it judges, and is not part of the search
    budget = Budget(cost=LIVE_BUDGET * costs.sample(), prices=prices)
    scorer, (by_budget, _) = load_scorer(work / "decoded" / "scorer.safetensors"), load_schedules(work, CLAIMED[0])
    schedule = by_budget[LIVE_BUDGET]
    strategies: dict[str, Strategy] = {
        "best_of_n": BestOfN(),
        "pruning": Prune(schedule.steps, schedule.keep, scorer=scorer),
        "fk_steering": FKSteering(lam=10.0, stop=0.7, kernel=FlowSDE(0.7), scorer=scorer),
    }
    selection, strict = search_pool.rewards(work)
    prompts = [search_pool.prompts()[row] for row in TEST][:LIVE_PROMPTS]
    lines = []
    for seed in (None, *TUNED):
        model = search_pool.pipeline()
        if seed is not None:
            model.load_lora(Path(f"runs/proofs/methods/flow_grpo/seed-{seed}/lora"))
        for place, prompt in enumerate(prompts):
            row: dict[str, object] = {"seed": seed, "prompt": prompt.text, "task": prompt.task}
            for name, strategy in strategies.items():
                grid = Sampling(STEPS).grid(model)
                run = SearchRun(model, [prompt], [selection], grid, 1.0, SEEDS, f"live/{place}")
                finished = strategy(run, budget)
                both = torch.stack(
                    [finished.scores[:, 0], strict.function(finished.samples, [prompt] * len(finished.samples))]
                )
                if name == "best_of_n":
                    row["one_sample"] = both.mean(1).tolist()
                row[name] = both[:, finished.best()[0]].tolist()
            lines.append(json.dumps(row))
            print(f"{seed}  {place + 1}/{len(prompts)}  {prompt.text}", flush=True)
    write_text(work / "live.jsonl", "".join(f"{line}\n" for line in lines))


def publish(work: Path) -> None:
    """Everything on the test prompts, from the pool and the live searches."""
    recorded, costs = RecordedPool.load(work).part(TEST), search_pool.costs(work)
    compared = Compared(recorded, costs, work)
    values = {name: {b: method(b) for b in BUDGETS} for name, method in compared.methods().items()}
    records = [*_pool_records(recorded, values), *_live_records(work)]
    by_forwards = Compared(recorded, FORWARDS_ALONE, work)
    extra = {
        "budgets": BUDGETS,
        "curves": {name: {b: method[b].mean(0).tolist() for b in BUDGETS} for name, method in values.items()},
        "cost_of_best_of_32": {name: compared.cost_of_best_of_32(name) for name in WAYS},
        "forwards_of_best_of_32": {name: by_forwards.cost_of_best_of_32(name) for name in WAYS},
        "schedules": json.loads((work / "schedules.json").read_text(encoding="utf-8")),
        "prices": asdict(costs),
    }
    claim = (
        "Noise-aware pruning finds more of the selection reward than best-of-N at equal cost in seconds (suite comp)"
    )
    write_results(
        RESULTS, "search_shapes", {**head(claim, "python scripts/benchmarks/benchmark.py search"), **extra}, records
    )


def _pool_records(recorded: RecordedPool, values: Mapping[str, Mapping[int, Tensor]]) -> Iterator[PromptRecord]:
    """Of every method over the budgets, and of the claimed ones at each."""
    for name in [*CLAIMED, *(name for name in values if name not in (*CLAIMED, "best_of_n"))]:
        for score, (suffix, metric) in enumerate((("", "selection reward"), (".strict", "strict"))):
            about = f"{metric}, budgets 4 to 32"
            yield from _records(f"{name}{suffix}", about, recorded, values, name, score, BUDGETS[1:])
        for budget in BUDGETS if name in CLAIMED else ():
            yield from _records(f"{name}.at_{budget}", "selection reward", recorded, values, name, 0, (budget,))


def _records(
    name: str,
    metric: str,
    recorded: RecordedPool,
    values: Mapping[str, Mapping[int, Tensor]],
    method: str,
    score: int,
    budgets: Sequence[int],
) -> list[PromptRecord]:
    """Per-prompt means over budgets: best-of-N before, the method after."""
    before, after = (
        torch.stack([values[key][b][:, score] for b in budgets]).mean(0).tolist() for key in ("best_of_n", method)
    )
    return [
        PromptRecord(name, metric, 0, recorded.tasks[row], recorded.texts[row], before[row], after[row], SUBSETS)
        for row in range(len(recorded))
    ]


def _live_records(work: Path) -> list[PromptRecord]:
    """One sample before, the search after."""
    rows = [json.loads(line) for line in (work / "live.jsonl").read_text(encoding="utf-8").splitlines()]
    records = []
    for model, method in itertools.product(("base", "tuned"), ("best_of_n", "pruning", "fk_steering")):
        for score, (suffix, metric) in enumerate((("", "selection reward"), (".strict", "strict"))):
            records += [
                PromptRecord(
                    f"{model}_{method}{suffix}",
                    f"{metric}, over one sample of the same model",
                    row["seed"] or 0,
                    row["task"],
                    row["prompt"],
                    row["one_sample"][score],
                    row[method][score],
                    1,
                )
                for row in rows
                if (row["seed"] is None) == (model == "base")
            ]
    return records


PARTS: dict[str, Callable[[Path], None]] = {
    "prepare": prepare,
    "prices": search_pool.measure,
    "record": search_pool.record,
    "tune": tune,
    "search": live,
    "publish": publish,
}
