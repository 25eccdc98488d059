"""Noise-aware pruning on sounds, beside best-of-N at equal seconds: a part of ``scripts/benchmarks/proofs.py audio``.

The selection reward is a regressor on tones-clap, its student reads latent previews, and the verifier only judges. Both
ways choose among the same recorded trajectories; schedules are chosen on prompts and noises of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from genalign.cli.main import main as genalign
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.records import PromptRecord
from genalign.scoring.budget import measure_prices, reward_call
from genalign.scoring.score import NamedReward
from genalign.search.pruning import PruneSchedule
from genalign.types import Prompt
from rewards.noise_aware import ScorerReward, load_scorer
from scripts.benchmarks import audio_pool
from scripts.benchmarks.cached import cached
from scripts.benchmarks.pruning_trials import Costs, Trials, best_of

BUDGETS = (4, 8, 16)  # so many finished clips' seconds
TUNING = 100
NAMES = {"iid": "noise_aware_pruning", "comp": "noise_aware_pruning_comp"}  # of rows, by the suite of a pool
TRIALS, SUBSETS, BATCH = 8, 40, 32
STUDENT = "noise-aware"
SCORER = "scorer.safetensors"


def prepare(work: Path) -> None:
    """Train the selection reward, and then its student."""
    reward = work / "selection" / SCORER
    follows = [f"--rewards.selection.function.init_args.path={reward}", f"--student.init_args.start={reward}"]
    for name, config, options in (
        ("selection", "tones_selection", []),
        ("aware", "tones_latent", follows),
    ):
        output = work / name
        command = [
            "train-noise-aware",
            "--config",
            f"scripts/configs/noise_aware/{config}.yaml",
            "--output",
            str(output),
            *options,
        ]
        if not (output / SCORER).exists() and (status := genalign(command)):
            raise SystemExit(f"{config} ended with status {status}")


def costs(work: Path) -> Costs:
    """Of every call in seconds, measured once: the machine should be quiet then."""

    def measured() -> dict[str, float]:
        model, prompts = audio_pool.pipeline(), audio_pool.pool_prompts(TUNING)[:BATCH]
        latents, level = model.initial_noise(range(len(prompts))), torch.full((len(prompts),), 0.5)
        student = load_scorer(work / "aware" / SCORER).student
        calls = [
            NamedReward("selection", ScorerReward(work / "selection" / SCORER)),
            NamedReward(STUDENT, lambda _, prompts: student(latents, level, prompts)),
        ]
        return measure_prices(model, calls, prompts, Sampling(audio_pool.STEPS).grid(model), repeats=15)

    prices = cached(work / "prices.json", measured)
    looks = {STUDENT: prices[reward_call(STUDENT)]}
    return Costs(audio_pool.STEPS, prices["nfe"], prices["decode"], prices[reward_call("selection")], looks)


@torch.no_grad()
def trials(work: Path, seed: int, subsets: int) -> Trials:
    """Pruning by the student on the pool of a seed."""
    student = load_scorer(work / "aware" / SCORER).student
    levels = Sampling(audio_pool.STEPS).grid(audio_pool.pipeline()).noise_share[list(audio_pool.LEVELS)].float()
    recorded = audio_pool.load(work / "pool", seed)

    def scored(previews: Tensor, prompt: Prompt) -> Tensor:
        """(N, L) of previews (N, L, ...) of one prompt."""
        prompts = [prompt] * len(previews)
        places = enumerate(levels.expand(len(previews), -1).T)
        return torch.stack([student(previews[:, i].float(), level, prompts) for i, level in places], dim=1)

    scores = [scored(tensors["previews"], prompt) for tensors, prompt in recorded]
    clean = [tensors["clean"] for tensors, _ in recorded]
    return Trials(torch.stack(scores)[:, None], torch.stack(clean), audio_pool.LEVELS, subsets)


def pruning_records(work: Path) -> list[PromptRecord]:
    """Best-of-N before and pruning after, on every pool but that of tuning: means over the budgets, and each."""
    prepare(work)
    prices = costs(work)
    audio_pool.record(work / "pool", work / "selection" / SCORER)
    schedule_of = schedules(work, prices)
    tested = [seed for seed, suite in audio_pool.SUITES.items() if suite in NAMES]
    return [record for seed in tested for record in _records(trials(work, seed, SUBSETS), seed, schedule_of, prices)]


def schedules(work: Path, prices: Costs) -> dict[int, PruneSchedule]:
    """For every budget that of most selection reward on the tuning pool."""

    def tuned() -> dict[int, object]:
        tuning = trials(work, TUNING, TRIALS)
        return {budget: asdict(tuning.best(STUDENT, budget, prices)) for budget in BUDGETS}

    schedules_json = cached(work / "schedules.json", tuned)
    return {
        int(budget): PruneSchedule(tuple(one["steps"]), tuple(one["keep"])) for budget, one in schedules_json.items()
    }


def _records(
    recorded: Trials, seed: int, schedule_of: Mapping[int, PruneSchedule], prices: Costs
) -> Iterator[PromptRecord]:
    ends, prompts = recorded.ends, audio_pool.pool_prompts(seed)
    before = {budget: best_of(ends, budget) for budget in schedule_of}
    after = {budget: recorded.at(schedule, STUDENT, budget, prices) for budget, schedule in schedule_of.items()}
    about = f"budgets {min(schedule_of)} to {max(schedule_of)}"
    rows = [
        ("", f"selection reward, {about}", 0, list(schedule_of)),
        (".strict", f"strict, {about}", 1, list(schedule_of)),
    ]
    rows += [(f".at_{budget}", "selection reward", 0, [budget]) for budget in schedule_of]
    for suffix, metric, score, budgets in rows:
        old, new = (torch.stack([side[b][:, score] for b in budgets]).mean(0).tolist() for side in (before, after))
        for place, prompt in enumerate(prompts):
            name = f"{NAMES[audio_pool.SUITES[seed]]}{suffix}"
            yield PromptRecord(name, metric, seed, prompt.task, prompt.text, old[place], new[place], SUBSETS)
