"""Searches and guided samplers side by side at equal cost, in the shapes world.

    python scripts/benchmarks/steering_table.py            every part
    python scripts/benchmarks/steering_table.py tune       one part

    prices      the seconds of every call here, and the spread of each reward, on a quiet machine
    tune        which of its settings every arm takes at each budget: prompts of val, a seed of its own
    measure     every arm at each budget and seed: prompts of comp
    publish     docs/results/steering_shapes.json

Everything is in runs/steering, and an interrupted part resumes there. Two rewards are searched: the differentiable
cosine of shapes-clip by all arms, the verifier's partial credit by those that need no gradient. Other scores judge what
was chosen, the verifier's strict accuracy above all, so that a sample that only pleases the searched reward shows.

The cost of a prompt is counted by the ledger, in NFE: a backward pass through the denoiser counts as ``BACKWARD``, and
decodings, rewards and their backward passes by their seconds over those of a forward, as measured here. A budget is so
many plain samples' cost. Where no whole size of an arm meets it, some prompts are searched with the next larger size,
so that the mean does; an arm whose smallest size costs more is left out. Wall-clock seconds are those of
``BATCH`` prompts that are searched together.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from genalign import assets
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import CPS, DDIM, FlowSDE
from genalign.evaluation.records import PromptRecord, mean
from genalign.prompts import drawn_in_turn
from genalign.scoring.budget import DECODE, NFE, Ledger, backward_call, measure_prices, reward_call
from genalign.scoring.score import NamedReward, score
from genalign.search import (
    DNO,
    Beam,
    BestOfN,
    DoobGuide,
    Evolution,
    FKSteering,
    ReNO,
    RewardGradient,
    ZeroOrder,
)
from genalign.search.engine import SearchRun
from genalign.search.strategy import Strategy, count_calls
from genalign.types import Pipeline, Prompt, RewardFunction
from genalign.worlds import shapes
from pipelines import SD3
from rewards.clip import ClipReward
from rewards.shapes import ShapesReward
from scripts.benchmarks.base_weights import require_base
from scripts.benchmarks.cached import cached
from scripts.benchmarks.pruning_trials import task_mean
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import RESULTS, head

BUDGETS = (8, 32)  # plain samples of STEPS steps
SEEDS, TUNING_SEED = (11, 12, 13), 100
STEPS, PROMPTS, TUNING_PROMPTS = 10, 100, 48
BATCH = 16  # prompts that are searched together, and the largest batch, so that no arm runs in smaller ones
BACKWARD = 2.0  # NFE of a backward pass through the denoiser, as in Budget(nfe=...)
TOLERANCE = 0.05  # of a budget, that an arm may leave over
GRADIENTS = ("das", "reno", "dno")  # the arms that need the gradient of the reward
JUDGES = {"clip": ("strict",), "partial": ("strict", "clip")}  # of what a search of a reward chose, never searched


@dataclass(frozen=True)
class Arm:
    """A method with the settings that are tried on val prompts, three where there is a choice.

    Attributes:
        settings: Strategies by a name that says what is special about them; their size is set apart.
        sized: Returns one of them at a size, from 1.
    """

    settings: Mapping[str, Any]
    sized: Callable[[Any, int], Strategy]


def by(field: str) -> Callable[[Any, int], Strategy]:
    """Set the size as this field of a strategy."""
    return lambda strategy, size: replace(strategy, **{field: size})


def das(lam: float) -> FKSteering:
    """DAS: it weighs at every step and reaches the full lam at the ninth of ten, as gamma 0.008 does of a hundred."""
    return FKSteering(lam=lam, start=0.1, every=0.1, gamma=0.08, guide=RewardGradient())


# Written before any of them was run on the val prompts. The weight of a reward is one over its standard deviation among
# samples of a prompt, so that lam, clip and learning rates mean the same for every reward.
ARMS: dict[str, Arm] = {
    "best_of_n": Arm({"ode": BestOfN()}, by("candidates")),
    "best_of_n_stochastic": Arm(
        {
            "ddim-1": BestOfN(None, DDIM(1.0)),
            "flow-sde-0.7": BestOfN(None, FlowSDE(0.7)),
            "cps-0.7": BestOfN(None, CPS(0.7)),
        },
        by("candidates"),
    ),
    "fk_steering": Arm(
        {
            "lam-auto": FKSteering(),
            "max-lam-10": FKSteering(lam=10.0, potential="max"),
            "flow-sde-from-0.4": FKSteering(start=0.4, kernel=FlowSDE(0.7)),
        },
        by("particles"),
    ),
    "das": Arm({f"lam-{lam}": das(lam) for lam in (5, 25, 100)}, by("particles")),
    "doob": Arm(
        {
            f"{proposals}-proposals-gamma-{gamma}": FKSteering(lam=10.0, guide=DoobGuide(proposals, gamma=gamma))
            for proposals, gamma in ((2, 0.25), (2, 0.75), (4, 0.5))
        },
        by("particles"),
    ),
    "beam": Arm(
        {"one-chain": Beam(1), "two-chains": Beam(2), "one-chain-flow-sde": Beam(1, kernel=FlowSDE(0.7))},
        by("proposals"),
    ),
    "zero_order": Arm(
        {
            "theta-0.95": ZeroOrder(),
            "theta-0.8": ZeroOrder(theta=0.8),
            "two-neighbors-theta-0.9": ZeroOrder(neighbors=2, theta=0.9),
        },
        by("rounds"),
    ),
    "evolution": Arm(
        {
            "steps-0-2-4": Evolution((0, 2, 4), None),
            "steps-0-1-2-strength-0.5": Evolution((0, 1, 2), None, strength=0.5),
            "steps-0-3-one-elite-strength-0.5": Evolution((0, 3), None, elites=1, strength=0.5),
        },
        lambda strategy, size: strategy.of_size(size),
    ),
    "reno": Arm({f"rate-{rate}": ReNO(learning_rate=rate) for rate in (5, 20, 80)}, by("iterations")),
    "dno": Arm({f"rate-{rate}": DNO(learning_rate=rate) for rate in (0.01, 0.05, 0.2)}, by("iterations")),
}
REWARDS: dict[str, Callable[[], RewardFunction]] = {
    "clip": lambda: ClipReward(assets.resolve("shapes-clip")),
    "partial": lambda: ShapesReward("partial"),
    "strict": lambda: ShapesReward("strict"),
}
SEARCHED = {"clip": tuple(ARMS), "partial": tuple(name for name in ARMS if name not in GRADIENTS)}


@dataclass(frozen=True)
class MeasuredPrices:
    """What a call costs.

    Attributes:
        seconds: Seconds of every call on one sample, backward passes included.
        spreads: Standard deviation of each reward among the samples of a prompt, averaged over prompts.
    """

    seconds: Mapping[str, float]
    spreads: Mapping[str, float]

    @property
    def nfe(self) -> dict[str, float]:
        """The NFE that every call counts."""
        return {call: cost / self.seconds[NFE] for call, cost in self.seconds.items()} | {backward_call(NFE): BACKWARD}

    def sample(self, reward: str) -> float:
        """The cost of a plain sample and its score, the unit of the budgets."""
        return Ledger(Counter({NFE: STEPS, DECODE: 1, reward_call(reward): 1})).cost(self.nfe)


class Bench:
    """The model, the rewards and the files of one table.

    Args:
        work: Folder of all measurements.
        pipeline: The model.
        rewards: The searched rewards and the judge, by name.
        tuning: Prompts that settings are chosen on.
        prompts: Prompts that are reported.
    """

    def __init__(
        self,
        work: Path,
        pipeline: Pipeline,
        rewards: Mapping[str, RewardFunction],
        tuning: Sequence[Prompt],
        prompts: Sequence[Prompt],
    ) -> None:
        self.work, self.pipeline, self.rewards, self.tuning, self.prompts = work, pipeline, rewards, tuning, prompts
        self._costs: dict[tuple[str, str, str, int], float] = {}  # counted so far

    @classmethod
    def shapes(cls, work: Path) -> Bench:
        """The table's own: shapes-sd3, with prompts of val to choose on, and of comp.

        Exits where the folder holds measurements of another base.
        """
        require_base(work, "shapes-sd3")
        pipeline = SD3.load(assets.resolve("shapes-sd3"), autocast=torch.bfloat16)
        rewards = {name: make() for name, make in REWARDS.items()}
        tuning, prompts = (
            drawn_in_turn(shapes.prompts(suite), count, seed=0)
            for suite, count in (("val", TUNING_PROMPTS), ("comp", PROMPTS))
        )
        return cls(work, pipeline, rewards, tuning, prompts)

    def run(self, reward: str, prompts: Sequence[Prompt], seed: str, weight: float = 1.0) -> SearchRun:
        """Begin a search of one reward, without guidance."""
        named = NamedReward(reward, self.rewards[reward], weight)
        return SearchRun(self.pipeline, prompts, [named], Sampling(STEPS).grid(self.pipeline), 1.0, BATCH, seed)

    @functools.cached_property
    def prices(self) -> MeasuredPrices:
        """What calls cost here, and the spreads of the rewards: measured once."""

        def measured() -> dict[str, Any]:
            prompts = [self.tuning[i % len(self.tuning)] for i in range(BATCH)]
            grid, named = Sampling(STEPS).grid(self.pipeline), [NamedReward(n, self.rewards[n]) for n in SEARCHED]
            seconds = measure_prices(self.pipeline, named, prompts, grid, repeats=15, gradients=True)
            spreads = dict[str, float]()
            for name in SEARCHED:  # standard deviations among eight samples of a prompt, averaged over prompts
                run = self.run(name, self.tuning[:BATCH], f"{TUNING_SEED}/spread")
                scores = run.finish(run.start(8)).scores[:, 0].view(-1, 8)
                spreads[name] = max(float(scores.std(dim=1).mean()), 1e-6)
            return {"seconds": seconds, "spreads": spreads}

        return MeasuredPrices(**cached(self.work / "prices.json", measured))

    def cost(self, reward: str, arm: str, setting: str, size: int) -> float:
        """The NFE of one prompt, counted without a call of a network."""
        key = reward, arm, setting, size
        if key not in self._costs:
            run = self.run(reward, self.tuning[:1], "count", 1.0 / self.prices.spreads[reward])
            self._costs[key] = count_calls(run, self.strategy(arm, setting, size)).cost(self.prices.nfe)
        return self._costs[key]

    @staticmethod
    def strategy(arm: str, setting: str, size: int) -> Strategy:
        """An arm with one of its settings, at a size."""
        return ARMS[arm].sized(ARMS[arm].settings[setting], size)

    def unit(
        self, arm: str, reward: str, setting: str, budget: int, seed: int, tuning: bool = False
    ) -> list[dict[str, Any]]:
        """Search every prompt, or read what an earlier call wrote: a row of JSON for each.

        Args:
            arm: The name of the method.
            reward: The name of the searched reward.
            setting: The name of one of the arm's settings.
            budget: The cost of a prompt on average, in plain samples.
            seed: The seed of all random numbers.
            tuning: Whether on the prompts to choose settings on.

        Raises:
            ValueError: The budget does not pay for a size of 1.
        """
        part = "tune" if tuning else "measure"
        path = self.work / part / reward / arm / f"{setting}-budget-{budget}-seed-{seed}.json"
        prompts = self.tuning if tuning else self.prompts

        def searched() -> list[dict[str, Any]]:
            limit = budget * self.prices.sample(reward)
            sizes = sizes_of_prompts(functools.partial(self.cost, reward, arm, setting), limit, len(prompts))
            rows: list[dict[str, Any]] = []
            for first, last in batches(sizes):
                strategy = self.strategy(arm, setting, sizes[first])
                rows += self._rows(strategy, reward, prompts[first:last], sizes[first], f"{seed}/{first}")
            scores = ", ".join(f"{name} {mean(row['scores'][name] for row in rows):.3f}" for name in rows[0]["scores"])
            cost = f"{_mean(rows, 'nfe'):.0f} NFE, {_mean(rows, 'seconds'):.2f} s, size {_mean(rows, 'size'):.2f}"
            print(f"{part} {reward}: {arm}, {setting}, budget {budget}, seed {seed}: {scores}; {cost}", flush=True)
            return rows

        rows: list[dict[str, Any]] = cached(path, searched)
        return rows

    def _rows(
        self, strategy: Strategy, reward: str, prompts: Sequence[Prompt], size: int, seed: str
    ) -> Iterator[dict[str, Any]]:
        """Search the prompts together, and judge the sample that each of them got."""
        run = self.run(reward, prompts, seed, 1.0 / self.prices.spreads[reward])
        began = time.perf_counter()
        finished = strategy(run, None)
        seconds = (time.perf_counter() - began) / len(prompts)
        best = finished.rows(finished.best())
        judges = [NamedReward(name, function) for name, function in self.rewards.items()]
        scores = score(judges, best.samples, prompts).nan_to_num(0.0)  # a sample of no finite values counts nothing
        calls = {call: count / len(prompts) for call, count in run.ledger.counts.items()}
        spent = {"size": size, "nfe": Ledger(Counter(calls)).cost(self.prices.nfe), "seconds": seconds, "calls": calls}
        for prompt, values in zip(prompts, scores.tolist(), strict=True):
            named = {name: round(value, 6) for name, value in zip(self.rewards, values, strict=True)}
            yield {"prompt": prompt.text, "task": prompt.task, "scores": named, **spent}

    def plain(self, seed: int) -> list[dict[str, Any]]:
        """The rows of a plain sample of every prompt, the first that best-of-N draws."""
        return self.unit("best_of_n", next(iter(SEARCHED)), "ode", 1, seed)

    def best_setting(self, reward: str, arm: str, budget: int) -> str | None:
        """The settings of most reward on the prompts to tune on; None if the budget pays for none of them."""
        rewards: dict[str, float] = {}
        for setting in ARMS[arm].settings:
            if self.cost(reward, arm, setting, 1) > budget * self.prices.sample(reward):
                continue
            if len(ARMS[arm].settings) == 1:
                return setting
            rows = self.unit(arm, reward, setting, budget, TUNING_SEED, tuning=True)
            rewards[setting] = _task_mean((row["task"], row["scores"][reward]) for row in rows)
        return max(rewards, key=rewards.__getitem__) if rewards else None


def sizes_of_prompts(cost: Callable[[int], float], limit: float, prompts: int) -> list[int]:
    """The size at which each prompt is searched, so that a prompt costs ``limit`` on average and not more.

    It is the largest that costs no more than the limit, and the next larger one for the first prompts, as many as what
    the others leave over pays for. Raises ValueError where a size of 1 costs more than the limit.
    """
    limit *= 1 + 1e-9  # sums of prices are rounded
    if cost(1) > limit:
        raise ValueError(f"a size of 1 costs {cost(1):.4g} NFE for each prompt, but the budget is {limit:.4g}")
    high = 2
    while cost(high) <= limit:
        high *= 2
    size = bisect.bisect_right(range(high), limit, lo=high // 2, key=cost) - 1
    larger = math.floor(prompts * (limit - cost(size)) / (cost(size + 1) - cost(size)))
    return [size + 1] * larger + [size] * (prompts - larger)


def batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and the last-but-one prompt of what is searched together: prompts of one size, at most ``BATCH``.

    They begin at multiples of ``BATCH``, so that the same prompts of different arms start from the same noise.
    """
    changes = [i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]]
    return itertools.pairwise(sorted({*range(0, len(sizes), BATCH), *changes, len(sizes)}))


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return mean(row[key] for row in rows)


def _task_mean(scores: Iterable[tuple[str, float]]) -> float:
    """The mean over tasks of the means of scores, each with its task."""
    tasks, values = zip(*scores, strict=True)
    return float(task_mean(torch.tensor(values, dtype=torch.float64), tasks))


def prices(bench: Bench) -> None:
    """Measure prices, and say what they mean for the arms."""
    for call, seconds in bench.prices.seconds.items():
        print(f"{call:28s}{1000 * seconds:10.3f} ms{bench.prices.nfe[call]:10.2f} NFE")
    samples = len(bench.prompts) * sum(BUDGETS) * len(SEEDS) * sum(map(len, SEARCHED.values()))
    tried = sum(len(ARMS[arm].settings) for arms in SEARCHED.values() for arm in arms if len(ARMS[arm].settings) > 1)
    samples += len(bench.tuning) * sum(BUDGETS) * tried
    hours = samples * bench.prices.sample("clip") * bench.prices.seconds[NFE] / 3600
    print(f"tune and measure take about {hours:.1f} hours")


def tune(bench: Bench) -> None:
    """Choose the settings of every arm at each budget."""
    for reward, arms in SEARCHED.items():
        for arm, budget in itertools.product(arms, BUDGETS):
            setting = bench.best_setting(reward, arm, budget)
            print(f"{reward}: {arm}, budget {budget}: {setting or 'no settings are within the budget'}", flush=True)


def measure(bench: Bench) -> None:
    """Search with every arm, seed by seed, so that an unfinished table has as many seeds of each arm."""
    for seed in SEEDS:
        bench.plain(seed)
        for reward, arms in SEARCHED.items():
            for arm, budget in itertools.product(arms, BUDGETS):
                if (setting := bench.best_setting(reward, arm, budget)) is not None:
                    bench.unit(arm, reward, setting, budget, seed)


def publish(bench: Bench, folder: Path = RESULTS) -> None:
    """Write every arm's gain over best-of-N at its cost, best-of-N's over a plain sample, and the table of both."""
    records: list[PromptRecord] = []
    costs = []
    for reward, arms in SEARCHED.items():
        for budget, arm in itertools.product(BUDGETS, arms):
            setting = bench.best_setting(reward, arm, budget)
            if setting is None:
                continue
            units = {seed: bench.unit(arm, reward, setting, budget, seed) for seed in SEEDS}
            for seed, rows in units.items():
                alone = arm == "best_of_n"
                before = bench.plain(seed) if alone else bench.unit("best_of_n", reward, "ode", budget, seed)
                records += _records(f"{reward}.{arm}.at_{budget}", reward, seed, before, rows)
            costs.append(_cost(bench.prices, reward, arm, budget, setting, [*itertools.chain(*units.values())]))
    claim = (
        "Searches at equal cost in the shapes world: gains of the searched reward and of other judges over best-of-N at"
        " the same budget, and of best-of-N over a plain sample (suite comp, 10 steps)"
    )
    header = head(claim, "python scripts/benchmarks/steering_table.py")
    extra = {
        "backward": BACKWARD,
        "tolerance": TOLERANCE,
        "budgets": BUDGETS,
        "prices": asdict(bench.prices) | {"nfe": bench.prices.nfe},
    }
    levels = [cost | level_of(records, cost) for cost in costs]
    write_results(folder, "steering_shapes", {**header, **extra, "steering": levels}, records)


def _records(
    name: str, reward: str, seed: int, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> Iterator[PromptRecord]:
    base = "a plain sample" if ".best_of_n.at" in name else "best-of-N"
    for metric in (reward, *JUDGES[reward]):
        suffix = "" if metric == reward else f".{metric}"
        for old, new in zip(before, after, strict=True):
            scores = old["scores"][metric], new["scores"][metric]
            yield PromptRecord(
                f"{name}{suffix}", f"{metric}, over {base}", seed, new["task"], new["prompt"], *scores, 1
            )


def _cost(
    prices: MeasuredPrices, reward: str, arm: str, budget: int, setting: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What an arm cost and how large it was, on average over prompts and seeds."""
    return {
        "reward": reward,
        "arm": arm,
        "budget": budget,
        "setting": setting,
        "size": _mean(rows, "size"),
        "nfe": _mean(rows, "nfe"),
        "share": _mean(rows, "nfe") / (budget * prices.sample(reward)),
        "seconds": _mean(rows, "seconds"),
        "priced_seconds": mean(Ledger(Counter(row["calls"])).cost(prices.seconds) for row in rows),
    }


def level_of(records: Sequence[Any], cost: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The mean of each score that an arm of the table ends at, over its seeds, with tasks weighed as in the rows."""
    reward = cost["reward"]
    name = f"{reward}.{cost['arm']}.at_{cost['budget']}"
    ends = {reward: name} | {judge: f"{name}.{judge}" for judge in JUDGES[reward]}
    return {
        "scores": {
            metric: _task_mean((r.task, r.after) for r in records if r.name == row) for metric, row in ends.items()
        }
    }


PARTS: dict[str, Callable[[Bench], None]] = {"prices": prices, "tune": tune, "measure": measure, "publish": publish}


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--work", type=Path, default=Path("runs/steering"))
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    bench = Bench.shapes(options.work)
    for part in options.parts or PARTS:
        PARTS[part](bench)


if __name__ == "__main__":
    main()
