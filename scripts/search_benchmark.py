"""Search at equal cost in the shapes world, from one recorded pool of trajectories.

    python scripts/search_benchmark.py prepare     the selection reward and its noise-aware students
    python scripts/search_benchmark.py prices      what every call costs here
    python scripts/search_benchmark.py record      the pool: previews of every trajectory, scored in every way
    python scripts/search_benchmark.py publish     schedules tuned on some prompts, curves and claims on the others

The selection reward is a regressor on shapes-clip; the verifier only judges. Costs are seconds at measured prices.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from proofs import RESULTS, head
from torch import Tensor

from genalign import assets
from genalign.budget import Ledger, Metered, measure_prices, reward_call
from genalign.checkpoints import load_state, save_state, write_json
from genalign.cli import main as genalign
from genalign.results import PromptRecord, write_results
from genalign.sampling import Sampling
from genalign.scoring import NamedReward
from genalign.search.engine import Run
from genalign.search.pruning import Pool, PruneSchedule, chosen_probabilities
from genalign.types import Prompt
from genalign.worlds import shapes
from pipelines import SD3
from rewards.noise_aware import ScorerReward, load_scorer
from rewards.shapes import ShapesReward

STEPS, SEEDS, PROMPTS = 20, 64, 200
LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)
BUDGETS = (2, 4, 8, 16, 32)
WAYS = ("raw", "decoded", "latent", "random", "oracle")
SUBSETS = 40


def prepare(work: Path) -> None:
    """Train the selection reward, then students of it that look at images and at latents."""
    selection = work / "selection" / "scorer.safetensors"
    if not selection.exists():
        _run("noise_aware_selection", work / "selection")
    for name in ("decoded", "latent"):
        if not (work / name / "scorer.safetensors").exists():
            _run(f"noise_aware_{name}", work / name)


def _run(config: str, output: Path) -> None:
    if status := genalign(["train-noise-aware", "--config", f"scripts/configs/{config}.yaml", "--output", str(output)]):
        raise SystemExit(f"{config} ended with status {status}")


@torch.no_grad()
def record(work: Path) -> None:
    """Every trajectory's previews at LEVELS, scored raw, by both students, and at its end by reward and verifier."""
    pipeline = SD3.load(assets.resolve("shapes-sd3"), autocast=torch.bfloat16)
    reward = ScorerReward(work / "selection" / "scorer.safetensors")
    students = {name: load_scorer(work / name / "scorer.safetensors") for name in ("decoded", "latent")}
    grid, chosen = Sampling(STEPS).grid(pipeline), prompts()
    for index, prompt in enumerate(chosen):
        path = work / "pool" / f"{index:03d}.safetensors"
        if path.exists():
            continue
        rewards = [NamedReward("selection", reward), NamedReward("strict", ShapesReward("strict"))]
        run = Run(Metered(pipeline, Ledger()), [prompt], rewards, grid, 1.0, SEEDS, f"pool/{index}")
        candidates, columns = run.start(SEEDS), []
        for level in LEVELS:
            candidates = run.advance(candidates, level + 1)
            raw = run.decoded_scores(candidates)[:, 0]
            columns.append(torch.stack([raw, *(students[name](run, candidates)[:, 0] for name in students)], dim=1))
        finished = run.finish(candidates)
        tensors = {"previews": torch.stack(columns, dim=1), "clean": finished.scores}
        save_state(path, tensors, {"prompt": prompt.text, "task": prompt.task})
        print(f"{index + 1}/{len(chosen)}  {prompt.text}", flush=True)


def prompts() -> list[Prompt]:
    """Held-out compositions, as many of each task as there are, in turn."""
    rng = np.random.default_rng(0)
    tasks = [[group[i] for i in rng.permutation(len(group))] for group in shapes.prompts("comp").by_task().values()]
    turns = itertools.zip_longest(*tasks)
    return [prompt for turn in turns for prompt in turn if prompt is not None][:PROMPTS]


@dataclass(frozen=True)
class Recorded:
    """The pool: ``previews`` (P, N, L, 3) by raw, decoded and latent scorer, ``clean`` (P, N, 2) by the selection
    reward and the verifier, and the prompts with their tasks."""

    previews: Tensor
    clean: Tensor
    texts: tuple[str, ...]
    tasks: tuple[str, ...]

    @classmethod
    def load(cls, work: Path) -> Recorded:
        """All that is there."""
        found = [load_state(path) for path in sorted((work / "pool").glob("*.safetensors"))]
        if len(found) < PROMPTS:
            raise SystemExit(f"the pool has {len(found)} of {PROMPTS} prompts: run record first")
        return cls(
            torch.stack([tensors["previews"] for tensors, _ in found]),
            torch.stack([tensors["clean"] for tensors, _ in found]),
            tuple(meta["prompt"] for _, meta in found),
            tuple(meta["task"] for _, meta in found),
        )

    def pool(self, way: str, rows: Sequence[int]) -> Pool:
        """Scores of previews in one way at every step (0 where none were recorded), the selection reward last."""
        clean = self.clean[list(rows), :, 0]
        scores = torch.zeros(len(rows), clean.shape[1], STEPS, 1)
        for place, level in enumerate(LEVELS):
            scores[:, :, level, 0] = self._column(way, rows, place)
        scores[:, :, -1, 0] = clean
        return Pool(scores)

    def _column(self, way: str, rows: Sequence[int], place: int) -> Tensor:
        if way == "oracle":
            return self.clean[list(rows), :, 0]
        if way == "random":
            return torch.rand(len(rows), SEEDS, generator=torch.Generator().manual_seed(place))
        return self.previews[list(rows), :, place, WAYS.index(way)]


@dataclass(frozen=True)
class Costs:
    """Seconds of one sample's calls, measured by ``genalign prices`` for the selection reward and each student."""

    forward: float
    decode: float
    reward: float
    students: Mapping[str, float]

    @property
    def sample(self) -> float:
        """A whole sample: one image of budget."""
        return STEPS * self.forward + self.decode + self.reward

    def preview(self, way: str) -> float:
        """Scoring one preview."""
        if way == "latent":
            return self.students["latent"]
        return {"random": 0.0, "decoded": self.decode + self.students["decoded"]}.get(way, self.decode + self.reward)

    def pruning(self, schedule: PruneSchedule, way: str, candidates: int) -> float:
        """What a schedule really costs."""
        counts, done = schedule.counts(candidates), [0, *(step + 1 for step in schedule.steps), STEPS]
        moves = sum(alive * (end - begin) for alive, (begin, end) in zip(counts, itertools.pairwise(done), strict=True))
        scored = sum(counts[:-1]) * self.preview(way)
        return moves * self.forward + scored + counts[-1] * (self.decode + self.reward)

    def affordable(self, schedule: PruneSchedule, way: str, budget: int) -> int:
        """The most candidates that ``budget`` images' cost begins, of those that were recorded."""
        limit = budget * self.sample * (1 + 1e-9)
        return max((n for n in range(1, SEEDS + 1) if self.pruning(schedule, way, n) <= limit), default=0)


def schedules() -> list[PruneSchedule]:
    """One to three steps of LEVELS with equal shares."""
    found = []
    for count, shares in ((1, (0.2, 0.33, 0.5)), (2, (0.33, 0.5, 0.6)), (3, (0.4, 0.5, 0.65))):
        for steps in itertools.combinations(LEVELS, count):
            found += [PruneSchedule(steps, (share,) * count) for share in shares]
    return found


def pruned(recorded: Recorded, rows: Sequence[int], schedule: PruneSchedule, way: str, candidates: int) -> Tensor:
    """The mean clean scores (P, 2) of what a schedule returns, over random subsets of the recorded candidates."""
    pool, generator = recorded.pool(way, rows), torch.Generator().manual_seed(candidates)
    total = torch.zeros(len(rows), 2, dtype=torch.float64)
    for _ in range(SUBSETS if candidates < SEEDS else 1):
        subset = torch.randperm(SEEDS, generator=generator)[:candidates]
        places = _winners(pool, schedule, subset)
        total += recorded.clean[list(rows)][torch.arange(len(rows)), places].double()
    return total / (SUBSETS if candidates < SEEDS else 1)


def _winners(pool: Pool, schedule: PruneSchedule, subset: Tensor) -> Tensor:
    """The places (P,) of what a schedule returns."""
    survivors = pool.pruned(schedule, subset)
    final = pool.scores[:, :, -1, 0].gather(1, survivors)
    return survivors[torch.arange(len(survivors)), final.argmax(1)]


def best_of(recorded: Recorded, rows: Sequence[int], count: int) -> Tensor:
    """The exact expected clean scores (P, 2) of best-of-``count``, selected by the selection reward."""
    clean = recorded.clean[list(rows)].double()
    order = clean[:, :, 0].argsort(dim=1)
    ranked = clean.gather(1, order[:, :, None].expand_as(clean))
    expected: Tensor = torch.einsum("pns,n->ps", ranked, chosen_probabilities(clean.shape[1], count))
    return expected


def publish(work: Path) -> None:
    """Schedules by the even prompts, everything else by the odd ones."""
    recorded, costs = Recorded.load(work), _costs(work)
    tune, test = range(0, PROMPTS, 2), range(1, PROMPTS, 2)
    records: list[PromptRecord] = []
    curves: dict[str, dict[str, object]] = {}
    baseline = {budget: best_of(recorded, test, budget) for budget in BUDGETS}
    for way in WAYS:
        schedule = _tuned(recorded, tune, way, costs)
        found = {b: pruned(recorded, test, schedule, way, costs.affordable(schedule, way, b)) for b in BUDGETS}
        name = {"decoded": "noise_aware_pruning"}.get(way, f"{way}_pruning")
        for score, metric in enumerate(("selection reward", "strict")):
            means = {b: (baseline[b][:, score], found[b][:, score]) for b in BUDGETS}
            suffix = "" if score == 0 else ".strict"
            records += _records(f"{name}{suffix}", f"{metric}, budgets 4 to 32", recorded, test, means, BUDGETS[1:])
            for b in BUDGETS:
                records += _records(f"{name}{suffix}.at_{b}", f"{metric}, budget {b}", recorded, test, means, (b,))
        curves[way] = {
            "steps": list(schedule.steps),
            "keep": list(schedule.keep),
            "reward": [float(found[b][:, 0].mean()) for b in BUDGETS],
            "cost_of_best_of_32": _cost_to_reach(
                recorded, test, schedule, way, costs, float(baseline[32][:, 0].mean())
            ),
        }
    curves["best_of_n"] = {"reward": [float(baseline[b][:, 0].mean()) for b in BUDGETS]}
    claim = (
        "Noise-aware pruning finds more selection reward than best-of-N at equal cost in seconds (suite comp, T = 20)"
    )
    made = head(claim, "python scripts/search_benchmark.py publish")
    extra = {"budgets": list(BUDGETS), "curves": curves, "prices": vars(costs)}
    write_results(RESULTS, "search_shapes", {**made, **extra}, records)


def _tuned(recorded: Recorded, rows: Sequence[int], way: str, costs: Costs) -> PruneSchedule:
    """The schedule of the largest mean reward over the budgets 4 to 32."""

    def merit(schedule: PruneSchedule) -> float:
        counts = [costs.affordable(schedule, way, budget) for budget in BUDGETS[1:]]
        if min(counts) == 0:
            return -np.inf
        return float(np.mean([float(pruned(recorded, rows, schedule, way, n)[:, 0].mean()) for n in counts]))

    return max(schedules(), key=merit)


def _cost_to_reach(
    recorded: Recorded, rows: Sequence[int], schedule: PruneSchedule, way: str, costs: Costs, reward: float
) -> float | None:
    """The least cost, as a share of best-of-32's, at which a schedule reaches ``reward``; None where 64 do not."""
    for candidates in range(1, SEEDS + 1):
        if float(pruned(recorded, rows, schedule, way, candidates)[:, 0].mean()) >= reward:
            return costs.pruning(schedule, way, candidates) / (32 * costs.sample)
    return None


def _records(
    name: str,
    metric: str,
    recorded: Recorded,
    rows: Sequence[int],
    means: Mapping[int, tuple[Tensor, Tensor]],
    budgets: Sequence[int],
) -> list[PromptRecord]:
    """Per-prompt means over budgets: best-of-N before, pruning after."""
    before, after = (torch.stack([means[b][side] for b in budgets]).mean(0).tolist() for side in (0, 1))
    return [
        PromptRecord(name, metric, 0, recorded.tasks[row], recorded.texts[row], before[i], after[i], SUBSETS)
        for i, row in enumerate(rows)
    ]


def prices(work: Path) -> None:
    """Measure what a forward, a decode, the selection reward and each student cost; on a quiet machine."""
    pipeline = SD3.load(assets.resolve("shapes-sd3"), autocast=torch.bfloat16)
    grid, asked = Sampling(STEPS).grid(pipeline), prompts()[:32]
    latents, level = pipeline.initial_noise(list(range(len(asked)))), torch.full((len(asked),), 0.5)
    decoded, latent = (load_scorer(work / name / "scorer.safetensors").student for name in ("decoded", "latent"))
    calls = [
        NamedReward("selection", ScorerReward(work / "selection" / "scorer.safetensors")),
        NamedReward("decoded", lambda samples, prompts: decoded(samples, level, prompts)),
        NamedReward("latent", lambda samples, prompts: latent(latents, level, prompts)),
    ]
    found = measure_prices(pipeline, calls, asked, grid, repeats=15)
    write_json(work / "prices.json", found)
    print(json.dumps(found, indent=2))


def _costs(work: Path) -> Costs:
    found = json.loads((work / "prices.json").read_text(encoding="utf-8"))
    students = {name: found[reward_call(name)] for name in ("decoded", "latent")}
    return Costs(found["forward"], found["decode"], found[reward_call("selection")], students)


PARTS = {"prepare": prepare, "prices": prices, "record": record, "publish": publish}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--work", type=Path, default=Path("runs/search"))
    options = parser.parse_args()
    for part in options.parts or PARTS:
        PARTS[part](options.work)


if __name__ == "__main__":
    main()
