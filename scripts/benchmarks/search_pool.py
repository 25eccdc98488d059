"""The recorded trajectories that searches are compared on, and what their calls cost."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from genalign import assets
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import ODE, FlowSDE, Kernel
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import load_state, save_state
from genalign.scoring.budget import measure_prices, reward_call
from genalign.scoring.score import NamedReward, score
from genalign.search.engine import Particles, SearchRun
from genalign.search.noise_aware import NoiseAware
from genalign.search.strategy import previews_of
from genalign.types import Prompt
from genalign.worlds import shapes
from pipelines import SD3
from rewards.noise_aware import load_scorer
from rewards.regressor import RegressorReward
from rewards.shapes import ShapesReward
from scripts.benchmarks.base_weights import require_base
from scripts.benchmarks.cached import cached
from scripts.benchmarks.pruning_trials import Costs, ScorePool, Trials

STEPS, SEEDS = 20, 64
LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)
STUDENTS = ("decoded-11", "decoded-12", "decoded-13", "latent-11")  # by what they see, and the seed of their training
OTHERS: dict[str, tuple[int, Kernel]] = {"half": (STEPS // 2, ODE()), "stochastic": (STEPS, FlowSDE(0.7))}
TUNED_RUNS = Path("runs/proofs/methods/flow_grpo")


@dataclass(frozen=True)
class PoolSource:
    """What a pool is recorded of: ``count`` prompts of a ``suite``, and a model.

    The model is the base, or with a ``seed`` the one that Flow-GRPO made of it with that seed.
    """

    suite: str
    count: int
    seed: int | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """One prompt of every task in turn."""
        return drawn_in_turn(shapes.prompts(self.suite), self.count, seed=0)


POOLS = {  # schedules are tuned on the first; the others are reported
    "tuning": PoolSource("val", 60),
    "base": PoolSource("comp", 100),
    **{f"tuned-{seed}": PoolSource("comp", 50, seed) for seed in (11, 12, 13)},
}


@functools.lru_cache(1)
def pipeline(seed: int | None = None) -> SD3:
    """The base model, as it is searched, or the model that Flow-GRPO made of it with a seed.

    Exits where the training of the tuned model is missing, not finished, or of another base.
    """
    run = TUNED_RUNS / f"seed-{seed}"
    if seed is not None:
        if not (run / "gain.json").exists():  # lora/ alone is written before a run has finished
            raise SystemExit(f"{run} is missing or unfinished: train it first, by scripts/benchmarks/proofs.py methods")
        require_base(TUNED_RUNS.parent, "shapes-sd3")
    model = SD3.load(assets.resolve("shapes-sd3"), autocast=torch.bfloat16)
    if seed is not None:
        model.load_lora(run / "lora")
    return model


def selection(work: Path) -> NamedReward:
    """The learned reward that searches select by."""
    return NamedReward("selection", RegressorReward(work / "selection" / "reward.safetensors"))


def judge() -> NamedReward:
    """The verifier, which only judges."""
    return NamedReward("strict", ShapesReward("strict"), weight=0.0)


def scorer(work: Path, student: str) -> NoiseAware:
    """A trained student, at every level that it was trained at."""
    return load_scorer(work / student / "scorer.safetensors", least_tau=-1.0)


def record(work: Path) -> None:
    """Record scores of the previews of all trajectories at LEVELS, and of their samples, of every pool.

    Previews are scored by the selection reward, the verifier and all students, samples by the first two. Then samples
    of half as many steps and of a stochastic sampler follow. Prompts that are recorded already are skipped.
    """
    for name, source in POOLS.items():
        prompts = source.prompts
        paths = [work / "pool" / name / f"{row:03d}.safetensors" for row in range(len(prompts))]
        missing = [row for row, path in enumerate(paths) if not path.exists()]
        if missing:
            model, students = pipeline(source.seed), {student: scorer(work, student) for student in STUDENTS}
        for row in missing:
            tensors = _recorded(model, work, prompts[row], f"pool/{source.suite}/{row}", students)
            meta = {"prompt": prompts[row].text, "task": prompts[row].task}
            save_state(paths[row], tensors, meta)
            print(f"{name} {row + 1}/{len(prompts)}  {meta['prompt']}", flush=True)


@torch.no_grad()
def _recorded(
    model: SD3, work: Path, prompt: Prompt, seed: str, students: Mapping[str, NoiseAware]
) -> dict[str, Tensor]:
    """All scores of one prompt, as ``RecordedPool`` has them."""

    def run_of(steps: int) -> SearchRun:
        both = [selection(work), judge()]
        return SearchRun(model, [prompt], both, Sampling(steps).grid(model), 1.0, SEEDS, seed)

    run = run_of(STEPS)
    candidates, columns = run.start(SEEDS), []
    for level in LEVELS:
        candidates = run.advance(candidates, level + 1)
        columns.append(_looks(run, candidates, students))
    finished = run.finish(candidates)
    tensors = {"previews": torch.stack(columns, dim=1), "clean": finished.scores}
    digests = [hashlib.blake2b(x.numpy().tobytes(), digest_size=8).digest() for x in finished.candidates.x]
    tensors["hashes"] = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
    for name, (steps, kernel) in OTHERS.items():
        other = run_of(steps)
        tensors[name] = other.finish(other.advance(other.start(SEEDS), steps, kernel)).scores
    return tensors


def _looks(run: SearchRun, candidates: Particles, students: Mapping[str, NoiseAware]) -> Tensor:
    """Scores (N, W) of previews as ``ways`` says, at every level: which of them are worth pruning at is tuned."""
    previews = previews_of(run, candidates)
    images = run.pipeline.decode(previews.latents)
    decoded = replace(previews, decode=lambda latents: images)  # once for all, in one batch
    own = [student.score(decoded)[:, :1] for student in students.values()]
    return torch.cat([score(run.rewards, images, previews.prompts), *own], dim=1)


def ways() -> tuple[str, ...]:
    """What scores previews: the selection reward itself, the verifier, and the students."""
    return ("raw", "strict", *STUDENTS)


@dataclass(frozen=True)
class RecordedPool:
    """The pool of P prompts x N seeds.

    ``previews`` (P, N, L, W) are scored as ``ways`` says; ``clean``, ``half`` and ``stochastic`` (P, N, 2) are the ends
    by the selection reward and the verifier.
    """

    previews: Tensor
    clean: Tensor
    half: Tensor
    stochastic: Tensor
    texts: tuple[str, ...]
    tasks: tuple[str, ...]

    @classmethod
    def load(cls, work: Path, name: str) -> RecordedPool:
        """Load a pool of ``POOLS``. Exits where prompts are missing."""
        folder = work / "pool" / name
        paths = [folder / f"{row:03d}.safetensors" for row in range(len(POOLS[name].prompts))]
        if missing := [path.name for path in paths if not path.exists()]:
            raise SystemExit(f"{folder} lacks {len(missing)} of {len(paths)} prompts: run record first")
        records = [load_state(path) for path in paths]
        names = ("previews", "clean", "half", "stochastic", "hashes")
        stacked = {name: torch.stack([tensors[name] for tensors, _ in records]) for name in names}
        texts, tasks = (tuple(meta[key] for _, meta in records) for key in ("prompt", "task"))
        ScorePool(stacked["clean"][:, :, None], stacked.pop("hashes"))  # refuses duplicate trajectories
        return cls(**stacked, texts=texts, tasks=tasks)

    def __len__(self) -> int:
        return len(self.texts)

    def look(self, way: str) -> Tensor:
        """The scores (P, N, L) of previews in one way."""
        return self.previews[..., ways().index(way)]

    def trials(self, way: str, subsets: int) -> Trials:
        """Pruning by previews that are scored in one way."""
        if way == "random":
            shape = len(self), subsets, self.clean.shape[1], len(LEVELS)
            scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        elif way == "oracle":
            scores = self.clean[:, None, :, :1].expand(-1, -1, -1, len(LEVELS))
        else:
            scores = self.look(way)[:, None]
        return Trials(scores, self.clean, LEVELS, subsets, self.tasks)

    def stopped(self, level: int) -> Tensor:
        """The ends (P, N, 2) of samples that are stopped early: their previews at a level, as they are."""
        place = LEVELS.index(level)
        return torch.stack([self.look("raw")[:, :, place], self.look("strict")[:, :, place]], dim=2)


def prices(work: Path) -> dict[str, float]:
    """What ``measure`` wrote: seconds by call."""
    measured: dict[str, float] = json.loads((work / "prices.json").read_text(encoding="utf-8"))
    return measured


def costs(work: Path, unit: str) -> Costs:
    """The costs of the calls for one sample, in seconds or in NFE, which count no decoding and no reward."""
    every = ("raw", "oracle", "random", *STUDENTS)
    if unit == "nfe":
        return Costs(STEPS, 1.0, 0.0, 0.0, dict.fromkeys(every, 0.0))
    measured = prices(work)
    decode, reward = measured["decode"], measured[reward_call("selection")]
    looks = dict.fromkeys(("raw", "oracle"), decode + reward) | {"random": 0.0}
    for student in STUDENTS:
        kind = student.split("-")[0]
        looks[student] = measured[reward_call(kind)] + (decode if kind == "decoded" else 0.0)
    return Costs(STEPS, measured["nfe"], decode, reward, looks)


def measure(work: Path) -> None:
    """Measure once what a forward, a decode, the selection reward and the students cost, and their gradients.

    The machine should be quiet. The student of latents reads the same ones in every call, so that it has no price of a
    gradient, which no search follows.
    """

    def measured() -> dict[str, float]:
        model, reward, texts = pipeline(), selection(work), POOLS["tuning"].prompts[:32]
        latents = model.initial_noise(list(range(len(texts))))
        kinds = {student.split("-")[0]: student for student in STUDENTS}
        students = {
            kind: scorer(work, student).student([reward]).requires_grad_(False) for kind, student in kinds.items()
        }
        calls: dict[str, Callable[[Tensor, Sequence[Prompt]], Tensor]] = {
            "decoded": students["decoded"],
            "latent": lambda samples, prompts: students["latent"](latents, prompts),
        }
        named = [reward, *(NamedReward(name, call) for name, call in calls.items())]
        return measure_prices(model, named, texts, Sampling(STEPS).grid(model), repeats=15, gradients=True)

    print(json.dumps(cached(work / "prices.json", measured), indent=2))
