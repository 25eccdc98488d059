"""What is measured of the gradients of rewards in the embedded worlds: the pathwise family, and mixtures of its LoRAs.

Each part trains the runs of a comparison file where they are missing, and writes docs/results. The parts are run by
``scripts/benchmarks/proofs.py``. The plan, in minutes of two cores (comparisons in scripts/configs/compare/):

| part | arms x seeds x minutes |
|---|---|
| pathwise | 9 x 3 x 4.5 = 122 |
| pathwise_hacking | 2 x 3 x 5 = 30 |
| pathwise_guards | 9 x 3 x 3.5 = 95, 1 to fit the rewards, and 3 x 0.5 for adapters at half weight |
| gradient_growth | 2 |
| soup | 2 x 3 x 2 = 12, and 3 x 1 for the mixtures |
| audio_pathwise | 2 x 3 x 5 = 30, and 3 for the pool |

That is 5 hours; ``scripts/benchmarks/offline_learning.py`` has learning from pools. Where it takes longer, arms go
before seeds, from the end of the comparisons' lists.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import yaml

import pipelines
from genalign import assets
from genalign.algorithms.interfaces import MetricSums, TermScales, UpdateBatch, UpdateContext
from genalign.algorithms.pathwise import PathwiseObjective, Tail
from genalign.algorithms.pathwise_recipes import draft
from genalign.algorithms.tails import Chain, RenoisedCopies
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.transitions import ODE
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord, prompt_records
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import write_json
from genalign.scoring.score import NamedReward
from genalign.training.memory_estimate import estimate_memory
from genalign.training.settings import FittedSettings
from genalign.worlds import shapes
from pipelines.meta_device import outline
from rewards.clip import ClipReward
from scripts.benchmarks.learned_proxies import write_proxies
from scripts.benchmarks.offline_learning import write_pool
from scripts.benchmarks.published_results import Measurement, write_results
from scripts.benchmarks.shapes_sampling import shapes_sampling
from scripts.benchmarks.trained_runs import (
    COMPARISONS,
    RESULTS,
    alarm_and_fall,
    arm_gains,
    arm_options,
    compared,
    differences,
    head,
    metrics,
    run_genalign,
)

WORK = Path("runs/proofs")
PROXIES, DIRECTION, TONES_POOL = WORK / "proxies", WORK / "direction.safetensors", WORK / "tones_pool"
"""The files and the pool that the comparisons name."""

RISE = 0.05  # of the CLIP reward, at which guards are compared
UNGUARDED, POLICY_GRADIENT = "none", "flow_grpo"
GROWTH_SAMPLES, GROWTH_MOVES, COPIES = 64, (1, 2, 4, 8), (0, 1, 2)
SCORES = ("clip", "partial", "strict")


def pathwise(work: Path) -> None:
    """A CLIP reward by its gradient and by Flow-GRPO, at equal seconds: the reward, and what it costs in accuracy."""
    runs = compared(work / "pathwise", "shapes_pathwise")
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        for score in SCORES:
            own = f"{name}.{score}" if score != "clip" else name
            records += arm_gains(own, score, score, by_seed)
    for name in runs.keys() - {POLICY_GRADIENT}:
        metric = f"clip, {name} - {POLICY_GRADIENT}"
        records += differences(f"{name}.difference", metric, "clip", runs[POLICY_GRADIENT], runs[name])
    records.sort(key=lambda record: record.name)
    claim = "A CLIP reward on held-out compositions (ODE) after 4 minutes by its gradient, and by Flow-GRPO"
    write_results(RESULTS, "pathwise_shapes", head(claim, "python scripts/benchmarks/proofs.py pathwise"), records)


def pathwise_hacking(work: Path) -> None:
    """Whether the alarm comes before partial credit has lost a tenth, where a CLIP reward's gradient is followed."""
    write_proxies(PROXIES)
    records: list[PromptRecord] = []
    for name, by_seed in compared(work / "pathwise_hacking", "shapes_pathwise_hacking").items():
        for seed, run in by_seed.items():
            alarm, fall = alarm_and_fall(run, "partial")
            records.append(PromptRecord(f"{name}.alarm_lead", "rounds", seed, "all", "the whole run", alarm, fall, 1))
    claim = "The alarm comes before a CLIP reward's gradient has cost a tenth of the held-out partial credit"
    header = head(claim, "python scripts/benchmarks/proofs.py pathwise_hacking")
    write_results(RESULTS, "pathwise_hacking_shapes", header, records)


def pathwise_guards(work: Path) -> None:
    """What holds a policy that follows a CLIP reward's gradient: its partial credit where the reward has risen."""
    write_proxies(PROXIES)
    if not DIRECTION.exists():
        write_direction(work / "directional.json")
    records: list[PromptRecord] = []
    runs = compared(work / "pathwise_guards", "shapes_pathwise_guards")
    held = {name: {seed: at_rise(looks(run)) for seed, run in by_seed.items()} for name, by_seed in runs.items()}
    held["half_weight"] = {
        seed: at_rise(looks_by_weight(run, work / "half_weight" / f"seed-{seed}"))
        for seed, run in runs[UNGUARDED].items()
    }
    for name, by_seed in held.items():
        for seed, (start, end) in by_seed.items():
            records.append(PromptRecord(name, "partial", seed, "all", "the whole run", start, end, 1))
            if name != UNGUARDED:
                metric, unguarded = f"partial, {name} - {UNGUARDED}", held[UNGUARDED][seed][1]
                records.append(
                    PromptRecord(f"{name}.difference", metric, seed, "all", "the whole run", unguarded, end, 1)
                )
    records.sort(key=lambda record: record.name)
    claim = (
        f"Held-out partial credit where the CLIP reward, whose gradient is followed, has risen by {RISE}: at the start"
        " and there, and beside the run without a guard; a run that never rises so far counts by its last evaluation."
        " half_weight is the final adapter of the run without a guard, mixed with the base model"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py pathwise_guards")
    write_results(RESULTS, "pathwise_guards_shapes", header, records)


Looks = list[tuple[float, float]]
"""The CLIP reward and the partial credit on held-out prompts, the base model's first."""


def looks(run: Path) -> Looks:
    """The evaluations of a run on held-out prompts, in order."""
    rows = [row["held_out"] for row in metrics(run) if row["held_out"]]
    return [_look(run / "before"), *((row["clip"]["mean"], row["partial"]["mean"]) for row in rows)]


def looks_by_weight(run: Path, folder: Path) -> Looks:
    """The evaluations of a run's final adapter at the weights 0, 1/2 and 1; that at 1/2 is made in ``folder``."""
    lora, evaluation, config = folder / "lora", folder / "evaluation", folder / "evaluation.json"
    if not (lora / "soup.json").exists():
        run_genalign("soup", "--adapters", json.dumps([str(run)]), "--weights", "[0.5]", "--output", str(lora))
    plain = json.loads((run / "config.json").read_text(encoding="utf-8"))
    size = {name: plain["before_after"][name] for name in ("prompts", "samples_per_task", "seeds")}
    rewards = {name: reward for name, reward in plain["rewards"].items() if name == "clip"}  # val has partial itself
    own = {"output": str(evaluation), "model": plain["model"], "sampling": plain["evaluation"], "rewards": rewards}
    write_json(config, {**own, **size, "batch_size": 96})
    run_genalign("evaluate", "prompts", "--config", str(config), "--lora", str(lora))
    return [_look(run / "before"), _look(evaluation), _look(run / "after")]


def _look(evaluation: Path) -> tuple[float, float]:
    scores = load_evaluation(evaluation).overall
    return scores["clip"].mean, scores["partial"].mean


def at_rise(curve: Looks) -> tuple[float, float]:
    """The held-out partial credit of the base model, and where the CLIP reward has risen by ``RISE``.

    Between two evaluations it is taken on a straight line; a curve that does not rise as far gives its last.
    """
    target = curve[0][0] + RISE
    for (low, earlier), (high, later) in pairwise(curve):
        if high >= target:
            return curve[0][1], earlier + (target - low) / (high - low) * (later - earlier)
    return curve[0][1], curve[-1][1]


def write_direction(own: Path) -> None:
    """Learn D2-Align's direction for the arm ``directional``, whose settings are written to ``own``."""
    options = arm_options("shapes_pathwise_guards", "directional", own)
    run_genalign("reward", "direction", *options, "--output", str(DIRECTION))


def gradient_growth(work: Path) -> None:
    """How long DRaFT-K's gradient is by K, how much DRaFT-LV's copies narrow it, and what memory either takes.

    The gradients are those of fixed samples of the base model, the memory that of a micro-batch of 96, as counted.
    """
    held = "memory of learning, MiB"
    measured = [
        *(Measurement(f"draft_{k}", "length of the mean gradient", gradients(Chain(), k)[0]) for k in GROWTH_MOVES),
        *(Measurement(f"draft_{k}", held, learning_memory(k)) for k in GROWTH_MOVES),
        *(Measurement(f"draft_{k}", f"{held}, without recomputation", memory_of_kept_graphs(k)) for k in GROWTH_MOVES),
        *(
            Measurement(f"draft_lv_{n}", "variance of a sample's gradient over the squared mean", gradients(tail, 1)[1])
            for n, tail in ((n, RenoisedCopies(n) if n else Chain()) for n in COPIES)
        ),
    ]
    claim = (
        f"The gradient of a CLIP reward on {GROWTH_SAMPLES} samples of the base model, by the moves it runs through,"
        " and the memory of an update, in which each move is computed again"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py gradient_growth")
    write_results(RESULTS, "gradient_growth_shapes", header, measured)


def gradients(tail: Tail, moves: int) -> tuple[float, float]:
    """The length of the mean gradient of all samples, and the variance of a sample's relative to that squared."""
    pipeline = pipelines.load(assets.resolve("shapes-sd3"))
    policy = Policy(pipeline.denoiser, Lora(rank=16, alpha=32), seed=0)
    for number, parameter in enumerate(policy.parameters):  # B starts at zero, where A has no gradient
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(number))
    prompts = drawn_in_turn(shapes.prompts("val"), GROWTH_SAMPLES, seed=0)
    seeds = tuple(derived_seed(0, "growth", place) for place in range(GROWTH_SAMPLES))
    grid = shapes_sampling(8).grid(pipeline)
    objective, rewards = PathwiseObjective(tail), [NamedReward("clip", ClipReward("shapes-clip"))]
    rows = []
    for place, prompt in enumerate(prompts):
        inputs = RolloutInputs(pipeline.encode([prompt.text]), torch.tensor([0]), seeds[place : place + 1], (place,))
        sampled = rollout(pipeline, inputs, grid, [ODE()] * len(grid), 1.0, range(len(grid) - moves, len(grid)))
        context = UpdateContext(pipeline, policy, grid, ODE(), 1.0, None, MetricSums(), [prompt], rewards)
        batch = UpdateBatch(sampled, torch.ones(1), torch.tensor([0]), on_policy=True)
        objective.backward(context, batch, TermScales(1.0, 0.0), place)
        rows.append(torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None]))
        for parameter in policy.parameters:
            parameter.grad = None
    every = torch.stack(rows).double()
    mean = every.mean(0)
    return float(mean.norm()), float((every - mean).square().sum(1).mean() / mean.square().sum())


def learning_memory(moves: int) -> float:
    """Count the tensors, in MiB at their peak, while DRaFT through so many moves learns from 96 samples."""
    meta = outline(assets.resolve("shapes-sd3"))
    policy = Policy(meta.pipeline.denoiser, Lora(rank=16, alpha=32))
    settings = FittedSettings(prompts_per_round=48, group_size=2, batch_size=96, updates_per_round=1)
    rewards = [NamedReward("clip", ClipReward("shapes-clip"))]
    (estimate,) = estimate_memory(meta, policy, draft(moves), settings, shapes_sampling(8), rewards).values()
    return estimate.phases["learning"]["tensors"] / 2**20


def memory_of_kept_graphs(moves: int) -> float:
    """Count as ``learning_memory`` does, where the graphs of all moves are held until the backward pass."""
    with mock.patch("genalign.algorithms.tails.checkpoint", lambda run, x, use_reentrant: run(x)):
        return learning_memory(moves)


def soup(work: Path) -> None:
    """Mixtures of two LoRAs with planted tastes: what each of five scores by both, beside the first adapter."""
    runs = compared(work / "tastes", "shapes_tastes")
    base = yaml.safe_load((COMPARISONS / "base_shapes.yaml").read_text(encoding="utf-8"))
    tastes = {
        name: {"class_path": "scripts.benchmarks.planted_rewards.Taste", "init_args": {"likes": likes}}
        for name, likes in (("red", "red"), ("bright", "brightness"))
    }
    configured = {
        "output": str(work / "soups"),  # of each mixture its own instead
        "model": base["model"],
        "prompts": "shapes:val",
        "rewards": tastes,
        "sampling": base["evaluation"],
        "seeds": 1,
    }
    write_json(work / "tastes-evaluation.json", configured)
    records: list[PromptRecord] = []
    for seed, red in runs["red"].items():
        front = work / "soups" / f"seed-{seed}"
        adapters = json.dumps([str(red), str(runs["bright"][seed])])
        evaluation = str(work / "tastes-evaluation.json")
        run_genalign("soup", "--adapters", adapters, "--evaluate", evaluation, "--output", str(front))
        first, *others = sorted(front.glob("share-*"))
        for point in others:
            for taste in tastes:
                sides = [load_evaluation(share / "evaluation") for share in (first, point)]
                records += prompt_records(f"{point.name}.{taste}", taste, seed, *sides)
    records.sort(key=lambda record: record.name)
    claim = "Mixtures of a LoRA that makes images red and one that makes them bright, beside the first alone"
    write_results(RESULTS, "soup_shapes", head(claim, "python scripts/benchmarks/proofs.py soup"), records)


def audio_pathwise(work: Path) -> None:
    """A CLAP reward's gradient, and the best of a pool of clips, on sounds."""
    write_pool("tones", work / "tones_pool.jsonl", TONES_POOL)
    records: list[PromptRecord] = []
    for name, by_seed in compared(work / "audio_pathwise", "tones_pathwise").items():
        for score in ("clap", "strict"):
            records += arm_gains(f"{name}.{score}", score, score, by_seed)
    records.sort(key=lambda record: record.name)
    claim = (
        "CLAP score and strict accuracy (suite comp, ODE) after the gradient of a CLAP reward, and after SFT on a pool"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py audio_pathwise")
    write_results(RESULTS, "pathwise_tones", header, records)
