"""The recorded trajectories that searches are compared on, and what their calls cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from genalign import assets
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import ODE, FlowSDE, Kernel
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import load_state, save_state, write_json
from genalign.scoring.budget import measure_prices, reward_call
from genalign.scoring.score import NamedReward
from genalign.search.engine import Particles, SearchRun
from genalign.types import Prompt
from genalign.worlds import shapes
from pipelines import SD3
from rewards.noise_aware import ScorerReward, load_scorer
from rewards.shapes import ShapesReward
from scripts.benchmarks.pruning_trials import Costs, ScorePool, Trials

STEPS, SEEDS, PROMPTS = 20, 64, 200
LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)
OTHERS: dict[str, tuple[int, Kernel]] = {"half": (STEPS // 2, ODE()), "stochastic": (STEPS, FlowSDE(0.7))}
PREVIEWS = ("raw", "decoded", "latent")


def pipeline() -> SD3:
    """The base model, as it is searched."""
    return SD3.load(assets.resolve("shapes-sd3"), autocast=torch.bfloat16)


def rewards(work: Path) -> list[NamedReward]:
    """The reward that selects, and the verifier that judges."""
    selection = ScorerReward(work / "selection" / "scorer.safetensors")
    return [NamedReward("selection", selection), NamedReward("strict", ShapesReward("strict"))]


def prompts() -> list[Prompt]:
    """Held-out compositions, as many of each task as there are, in turn."""
    return drawn_in_turn(shapes.prompts("comp"), PROMPTS, seed=0)


@torch.no_grad()
def record(work: Path) -> None:
    """Record scores of the previews of all trajectories at LEVELS, and of their samples.

    Previews are scored by the raw reward and by both students, samples by the selection reward and the verifier. Then
    samples of half as many steps and of a stochastic sampler follow. Prompts that are recorded already are skipped.
    """
    model, judges = pipeline(), rewards(work)
    students = _students(work)
    for index, prompt in enumerate(prompts()):
        path = work / "pool" / f"{index:03d}.safetensors"
        if path.exists():
            continue
        run = _run(model, prompt, judges, STEPS, index)
        candidates, columns = run.start(SEEDS), []
        for level in LEVELS:
            candidates = run.advance(candidates, level + 1)
            columns.append(_looks(run, candidates, students))
        finished = run.finish(candidates)
        tensors = {"previews": torch.stack(columns, dim=1), "clean": finished.scores}
        digests = [hashlib.blake2b(x.numpy().tobytes(), digest_size=8).digest() for x in finished.candidates.x]
        tensors["hashes"] = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
        for name, (steps, kernel) in OTHERS.items():
            other = _run(model, prompt, judges, steps, index)
            tensors[name] = other.finish(other.advance(other.start(SEEDS), steps, kernel)).scores
        save_state(path, tensors, {"prompt": prompt.text, "task": prompt.task})
        print(f"{index + 1}/{PROMPTS}  {prompt.text}", flush=True)


def _students(work: Path) -> dict[str, nn.Module]:
    return {name: load_scorer(work / name / "scorer.safetensors").student for name in ("decoded", "latent")}


def _looks(run: SearchRun, candidates: Particles, students: Mapping[str, nn.Module]) -> Tensor:
    """Scores (N, 3) of previews as PREVIEWS says, at every level: which of them are worth pruning at is tuned."""
    preview, prompts = candidates.preview, [run.prompts[0]] * len(candidates)
    images = run.pipeline.decode(preview)
    level = run.grid.noise_share[candidates.steps_done - 1].float().expand(len(candidates))
    looks = [run.rewards[0](images, prompts), students["decoded"](images, level, prompts)]
    return torch.stack([*looks, students["latent"](preview, level, prompts)], dim=1)


def _run(model: SD3, prompt: Prompt, judges: list[NamedReward], steps: int, index: int) -> SearchRun:
    return SearchRun(model, [prompt], judges, Sampling(steps).grid(model), 1.0, SEEDS, f"pool/{index}")


@dataclass(frozen=True)
class RecordedPool:
    """The pool of P prompts x N seeds.

    ``previews`` (P, N, L, 3) are scored as PREVIEWS says; ``clean``, ``half`` and ``stochastic`` (P, N, 2) are the ends
    by the selection reward and the verifier.
    """

    previews: Tensor
    clean: Tensor
    half: Tensor
    stochastic: Tensor
    texts: tuple[str, ...]
    tasks: tuple[str, ...]

    @classmethod
    def load(cls, work: Path) -> RecordedPool:
        """Load the complete pool from disk. Exits where prompts are missing."""
        records = [load_state(path) for path in sorted((work / "pool").glob("*.safetensors"))]
        if len(records) < PROMPTS:
            raise SystemExit(f"the pool has {len(records)} of {PROMPTS} prompts: run record first")
        names = ("previews", "clean", "half", "stochastic", "hashes")
        stacked = {name: torch.stack([tensors[name] for tensors, _ in records]) for name in names}
        texts, tasks = (tuple(meta[key] for _, meta in records) for key in ("prompt", "task"))
        ScorePool(stacked["clean"][:, :, None], stacked.pop("hashes"))  # refuses duplicate trajectories
        return cls(**stacked, texts=texts, tasks=tasks)

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, rows: Sequence[int]) -> RecordedPool:
        """Select the prompts of these rows."""
        index = list(rows)
        tensors = (self.previews, self.clean, self.half, self.stochastic)
        texts, tasks = (tuple(column[row] for row in index) for column in (self.texts, self.tasks))
        return RecordedPool(*(tensor[index] for tensor in tensors), texts, tasks)

    def trials(self, way: str, subsets: int) -> Trials:
        """Pruning by previews that are scored in one way."""
        if way == "random":
            shape = len(self), subsets, SEEDS, len(LEVELS)
            scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        elif way == "oracle":
            scores = self.clean[:, None, :, :1].expand(-1, -1, -1, len(LEVELS))
        else:
            scores = self.previews[:, None, :, :, PREVIEWS.index(way)]
        return Trials(scores, self.clean, LEVELS, subsets)


def costs(work: Path) -> Costs:
    """What ``measure`` wrote, in seconds."""
    prices = json.loads((work / "prices.json").read_text(encoding="utf-8"))
    decode, reward = prices["decode"], prices[reward_call("selection")]
    looks = dict.fromkeys(("raw", "oracle"), decode + reward) | {"random": 0.0}
    looks |= {"decoded": decode + prices[reward_call("decoded")], "latent": prices[reward_call("latent")]}
    return Costs(STEPS, prices["nfe"], decode, reward, looks)


FORWARDS_ALONE = Costs(STEPS, 1.0, 0.0, 0.0, dict.fromkeys(("raw", "oracle", "random", "decoded", "latent"), 0.0))


def measure(work: Path) -> None:
    """Measure what a forward, a decode, the selection reward and each student cost; on a quiet machine."""
    model, prompts_to_time = pipeline(), prompts()[:32]
    latents, level = model.initial_noise(list(range(len(prompts_to_time)))), torch.full((len(prompts_to_time),), 0.5)
    decoded, latent = _students(work).values()
    calls = [
        NamedReward("selection", ScorerReward(work / "selection" / "scorer.safetensors")),
        NamedReward("decoded", lambda samples, prompts: decoded(samples, level, prompts)),
        NamedReward("latent", lambda samples, prompts: latent(latents, level, prompts)),
    ]
    prices = measure_prices(model, calls, prompts_to_time, Sampling(STEPS).grid(model), repeats=15)
    write_json(work / "prices.json", prices)
    print(json.dumps(prices, indent=2))
