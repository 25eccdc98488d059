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
from torch.func import functional_call

from genalign.diffusion.sampling import Sampling
from genalign.evaluation.records import PromptRecord
from genalign.scoring.budget import measure_prices, reward_call
from genalign.scoring.score import NamedReward
from genalign.search.noise_aware import NoiseAware
from genalign.search.pruning import PruneSchedule
from genalign.types import Prompt
from rewards.noise_aware import load_scorer
from rewards.regressor import RegressorReward
from scripts.benchmarks import audio_pool
from scripts.benchmarks.base_weights import require_base
from scripts.benchmarks.cached import cached
from scripts.benchmarks.pruning_trials import Costs, Trials, best_of
from scripts.benchmarks.trained_runs import run_genalign
from scripts.pretrain import selection_reward

BUDGETS = (4, 8, 16)  # so many finished clips' seconds
TUNING = 100
NAMES = {"iid": "noise_aware_pruning", "comp": "noise_aware_pruning_comp"}  # of rows, by the suite of a pool
TRIALS, SUBSETS, BATCH = 8, 40, 32
STUDENT = "noise-aware"
SCORER, REWARD = "scorer.safetensors", "reward.safetensors"


def prepare(work: Path) -> None:
    """Train the selection reward, and then its student."""
    reward, output, config = (
        work / "selection" / REWARD,
        work / "aware",
        "scripts/configs/noise_aware/tones_latent.yaml",
    )
    if not reward.exists():
        selection_reward.main(["tones", "--output", str(reward)])
    command = ["train-noise-aware", "--config", config, "--output", str(output)]
    command.append(f"--rewards.selection.function.init_args.weights={reward}")
    if not (output / SCORER).exists():
        run_genalign(*command)


def scorer(work: Path) -> NoiseAware:
    """The student, at every level that it was trained at."""
    return load_scorer(work / "aware" / SCORER, least_tau=-1.0)


def costs(work: Path) -> Costs:
    """Of every call in seconds, measured once: the machine should be quiet then."""

    def measured() -> dict[str, float]:
        model, prompts = audio_pool.pipeline(), audio_pool.pool_prompts(TUNING)[:BATCH]
        latents = model.initial_noise(range(len(prompts)))
        reward = NamedReward("selection", RegressorReward(work / "selection" / REWARD))
        student = scorer(work).student([reward])
        calls = [reward, NamedReward(STUDENT, lambda _, prompts: student(latents, prompts))]
        return measure_prices(model, calls, prompts, Sampling(audio_pool.STEPS).grid(model), repeats=15)

    prices = cached(work / "prices.json", measured)
    looks = {STUDENT: prices[reward_call(STUDENT)]}
    return Costs(audio_pool.STEPS, prices["nfe"], prices["decode"], prices[reward_call("selection")], looks)


@torch.no_grad()
def trials(work: Path, seed: int, subsets: int) -> Trials:
    """Pruning by the student on the pool of a seed."""
    student = scorer(work)
    reward = NamedReward("selection", RegressorReward(work / "selection" / REWARD))
    levels = Sampling(audio_pool.STEPS).grid(audio_pool.pipeline()).noise_share[list(audio_pool.LEVELS)].tolist()
    recorded = audio_pool.load(work / "pool", seed)

    def scored(previews: Tensor, prompt: Prompt) -> Tensor:
        """(N, L) of previews (N, L, ...) of one prompt."""
        network, prompts = student.student([reward]), [prompt] * len(previews)
        weights = [dict(student.level(share).weights) for share in levels]
        columns = [functional_call(network, own, (previews[:, i].float(), prompts)) for i, own in enumerate(weights)]
        return torch.stack(columns, dim=1)

    scores = [scored(tensors["previews"], prompt) for tensors, prompt in recorded]
    clean = [tensors["clean"] for tensors, _ in recorded]
    tasks = [prompt.task for _, prompt in recorded]
    return Trials(torch.stack(scores)[:, None], torch.stack(clean), audio_pool.LEVELS, subsets, tasks)


def pruning_records(work: Path) -> list[PromptRecord]:
    """Best-of-N before and pruning after, on every pool but that of tuning: means over the budgets, and each.

    Exits where the folder was made with another base.
    """
    require_base(work, "tones-audio")
    prepare(work)
    prices = costs(work)
    audio_pool.record(work / "pool", work / "selection" / REWARD)
    schedule_of = schedules(work, prices)
    tested = [seed for seed, suite in audio_pool.SUITES.items() if suite in NAMES]
    return [record for seed in tested for record in _records(trials(work, seed, SUBSETS), seed, schedule_of, prices)]


def budget_shares(work: Path) -> dict[int, float]:
    """What the schedule of each budget spends of it, after ``pruning_records``."""
    prices = costs(work)
    chosen = schedules(work, prices)
    return {budget: prices.share(chosen[budget], STUDENT, budget, audio_pool.CANDIDATES) for budget in chosen}


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
