"""What is measured of the gradients of rewards in the embedded worlds: the pathwise family, and mixtures of its LoRAs.

Each part trains the runs of a comparison file where they are missing, and writes docs/results. The parts are run by
``scripts/benchmarks/proofs.py``. The plan, in minutes of two cores (comparisons in scripts/configs/compare/):

| part | arms x seeds x minutes |
|---|---|
| pathwise | 9 x 3 x 5.2 = 140, 20 of them for evaluations and the monitor |
| pathwise_hacking | 2 x 3 x 6.5 = 39 |
| pathwise_guards | 7 x 3 x 3.7 = 78, 1 to fit the rewards, and 8 for the adapters near the rise |
| gradient_growth | 2 |
| soup | 2 x 3 x 2 = 12, and 3 x 1 for the mixtures |
| audio_pathwise | 2 x 3 x 5 = 30, and 3 for the pool |

That is 5.2 hours. ``scripts/benchmarks/offline_learning.py`` has learning from pools (1.4), ``few_steps.py`` few-step
students (3.5), ``personal_tastes.py`` people (0.8), ``proofs.py hypernetworks`` hypernetworks (1.4) and ``proofs.py
matching_losses`` losses on groups (1.6): 13.9 hours in all. Where it takes longer, arms go before seeds, from the end
of the comparisons' lists. Rounds of pathwise_hacking and pathwise_guards are fixed by the pilot pathwise_none of
shapes_guard_pilots.yaml, which ``scripts/benchmarks/guards.py`` explains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
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
from genalign.evaluation.evaluate import Evaluation, load_evaluation
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
    finished,
    hacking_reports,
    head,
    metrics,
    run_genalign,
    run_record,
    stopped,
)

WORK = Path("runs/proofs")
DIRECTION, TONES_POOL = WORK / "direction.safetensors", WORK / "tones_pool"
"""The file and the pool that the comparisons name."""

RISE = 0.05  # of the CLIP reward, at which guards are compared
UNGUARDED, POLICY_GRADIENT = "none", "flow_grpo"
GROWTH_SAMPLES, GROWTH_MOVES, COPIES = 64, (1, 2, 4, 8), (0, 1, 2)
TASTES = {"red": "red", "bright": "brightness"}  # of shapes_tastes.yaml, by the names of its arms and rewards
SCORES = ("clip", "partial", "strict")
COMPOSITIONS = {"prompts": "shapes:comp:colors,position,color_attr", "samples_per_task": 96, "seeds": 1}
"""The evaluation of adapters where the reward has risen: tasks of many prompts, by the verifier."""


def pathwise(work: Path) -> None:
    """A CLIP reward by its gradient and by Flow-GRPO, at equal seconds: the reward, and what it costs in accuracy."""
    write_proxies()
    every = compared(work / "pathwise", "shapes_pathwise", allow_failed=True)
    runs = finished(every)
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        for score in SCORES:
            own = f"{name}.{score}" if score != "clip" else name
            records += arm_gains(own, score, score, by_seed)
        for seed, run in by_seed.items():
            records += panel_records(name, seed, run)
    for name in runs.keys() - {POLICY_GRADIENT}:
        metric = f"clip, {name} - {POLICY_GRADIENT}"
        records += differences(f"{name}.difference", metric, "clip", runs[POLICY_GRADIENT], runs[name])
    records.sort(key=lambda record: record.name)
    claim = (
        "A CLIP reward and accuracy on held-out compositions (ODE) at the end of 4 minutes by its gradient, and by"
        " Flow-GRPO; how many runs had an alarm, and in which round the first came"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py pathwise")
    write_results(RESULTS, "pathwise_shapes", {**header, "failed": stopped(every)}, records)


def panel_records(name: str, seed: int, run: Path) -> list[PromptRecord]:
    """Whether a run had an alarm of reward hacking, its first one, and the minutes of training."""
    rows, alarms = metrics(run), [number for number, report in hacking_reports(run) if report.alarm]
    first = "round of the first alarm, one past the last where there is none"
    return [
        run_record(f"{name}.alarms", "runs with an alarm", seed, float(bool(alarms))),
        run_record(f"{name}.first_alarm", first, seed, float(alarms[0] if alarms else len(rows))),
        run_record(f"{name}.minutes", "minutes of training", seed, rows[-1]["machine"]["seconds"] / 60),
    ]


def pathwise_hacking(work: Path) -> None:
    """Whether the alarm comes before partial credit has lost a tenth, where a CLIP reward's gradient is followed."""
    write_proxies()
    runs = compared(work / "pathwise_hacking", "shapes_pathwise_hacking", allow_failed=True)
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        for seed, run in by_seed.items():
            (alarm, fall), rounds = alarm_and_fall(run, "partial"), len(metrics(run))
            records += [
                run_record(f"{name}.alarm_lead", "rounds", seed, fall, alarm),
                run_record(f"{name}.alarms", "runs with an alarm", seed, float(alarm < rounds)),
                run_record(f"{name}.falls", "runs that lost a tenth of partial credit", seed, float(fall < rounds)),
            ]
    claim = (
        "By how many rounds the alarm comes before a CLIP reward's gradient has cost a tenth of the held-out partial"
        " credit (what does not come counts as one past the last round), and how many runs had either"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py pathwise_hacking")
    write_results(RESULTS, "pathwise_hacking_shapes", {**header, "failed": stopped(runs)}, records)


@dataclass(frozen=True)
class Look:
    """The CLIP reward of an adapter on held-out prompts; ``lora`` is None for the base model."""

    clip: float
    lora: Path | None


def pathwise_guards(work: Path) -> None:
    """What holds a policy that follows a CLIP reward's gradient: its partial credit where the reward has risen."""
    write_proxies()
    if not DIRECTION.exists():
        write_direction(work / "directional.json")
    runs, folder = compared(work / "pathwise_guards", "shapes_pathwise_guards", allow_failed=True), work / "at_the_rise"
    curves = {name: {seed: looks(run) for seed, run in by_seed.items()} for name, by_seed in runs.items()}
    curves["half_weight"] = {
        seed: looks_by_weight(run, folder / "half_weight" / f"seed-{seed}") for seed, run in runs[UNGUARDED].items()
    }
    records: list[PromptRecord] = []
    held: dict[tuple[str, int], list[PromptRecord]] = {}
    for name, by_seed in curves.items():
        for seed, curve in by_seed.items():
            held[name, seed] = rise_records(name, seed, curve, folder)
            reached, metric = float(bool(held[name, seed])), f"runs whose CLIP reward has risen by {RISE}"
            records += [run_record(f"{name}.reached", metric, seed, reached), *held[name, seed]]
    for (name, seed), own in held.items():
        unguarded = held.get((UNGUARDED, seed), [])
        if name != UNGUARDED and own and unguarded:
            metric = f"partial, {name} - {UNGUARDED}"
            records += [
                replace(row, name=f"{name}.difference", metric=metric, before=first.after)
                for first, row in zip(unguarded, own, strict=True)
            ]
    records.sort(key=lambda record: record.name)
    claim = (
        f"Partial credit on held-out compositions (ODE) where the CLIP reward, whose gradient is followed, has risen by"
        f" {RISE}: beside the base model, and beside the run without a guard of the same seed; only runs that rise so"
        " far count, and how many do is said. half_weight is the last adapter of the run without a guard, mixed with"
        " the base model"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py pathwise_guards")
    write_results(RESULTS, "pathwise_guards_shapes", {**header, "failed": stopped(runs)}, records)


def looks(run: Path) -> list[Look]:
    """The evaluations of a run on held-out prompts, in order, the base model's first."""
    rows = [row for row in metrics(run) if row["held_out"]]
    adapters = [run / "checkpoints" / f"round-{row['round'] + 1:06d}" / "lora" for row in rows]
    found = [Look(row["held_out"]["clip"]["mean"], lora) for row, lora in zip(rows, adapters, strict=True)]
    return [Look(load_evaluation(run / "before").overall["clip"].mean, None), *found]


def looks_by_weight(run: Path, folder: Path) -> list[Look]:
    """The evaluations of a run's last adapter at the weights 0, 1/2 and 1; that at 1/2 is made in ``folder``."""
    lora, last = folder / "lora", run / "lora-last"
    if not (lora / "soup.json").exists():
        run_genalign("soup", "--adapters", json.dumps([str(last)]), "--weights", "[0.5]", "--output", str(lora))
    plain = json.loads((run / "config.json").read_text(encoding="utf-8"))
    held_out = {name: plain["held_out"][name] for name in ("prompts", "samples_per_task", "seeds")}
    rewards = {"clip": {"function": plain["held_out"]["scorers"]["clip"]}}
    clip = evaluated(lora, folder / "evaluation", {**held_out, "rewards": rewards}).overall["clip"].mean
    first, *_, end = looks(run)
    return [first, Look(clip, lora), replace(end, lora=last)]


def rise_records(name: str, seed: int, curve: Sequence[Look], folder: Path) -> list[PromptRecord]:
    """Partial credit of each prompt, of the base model and where the CLIP reward has risen by ``RISE``.

    Between two adapters it is taken on a straight line. Their evaluations are made in ``folder``. A curve that does not
    rise as far has no records.
    """
    found = at_rise([look.clip for look in curve])
    if found is None:
        return []
    place, share = found
    folders = [folder / "base", *(folder / name / f"seed-{seed}-{number}" for number in range(1, len(curve)))]
    base, *sides = (evaluated(curve[n].lora, folders[n], COMPOSITIONS) for n in (0, place, place + 1))
    rows = zip(*(prompt_records(name, "partial", seed, base, side) for side in sides), strict=True)
    return [replace(row, after=row.after + share * (later.after - row.after)) for row, later in rows]


def at_rise(rewards: Sequence[float]) -> tuple[int, float] | None:
    """Find where rewards first reach ``RISE`` above the first one: the place before, and the share of the way after it.

    None where they never do.
    """
    target = rewards[0] + RISE
    for place, (low, high) in enumerate(pairwise(rewards)):
        if high >= target:
            return place, (target - low) / (high - low)
    return None


def evaluated(lora: Path | None, folder: Path, own: Mapping[str, Any]) -> Evaluation:
    """Evaluate shapes-sd3, or an adapter of it, by settings of ``genalign evaluate prompts``, or read the result."""
    base = yaml.safe_load((COMPARISONS / "base_shapes.yaml").read_text(encoding="utf-8"))
    settings = {"model": base["model"], "sampling": base["evaluation"], "batch_size": 96, "output": str(folder), **own}
    config = folder.with_name(f"{folder.name}.json")
    write_json(config, settings)
    adapter = [] if lora is None else ["--lora", str(lora)]
    run_genalign("evaluate", "prompts", "--config", str(config), *adapter)
    return load_evaluation(folder)


def write_direction(own: Path) -> None:
    """Learn D2-Align's direction for the arm ``directional``, whose settings are written to ``own``."""
    options = arm_options("shapes_pathwise_guards", "directional", own)
    run_genalign("reward", "direction", *options, "--output", str(DIRECTION))


def gradient_growth(work: Path) -> None:
    """How long DRaFT-K's gradient is by K, how much DRaFT-LV's copies narrow it, and what memory either takes.

    The gradients are those of fixed samples of the base model, the memory that of a micro-batch of 96, as counted.
    """
    memory, variance = "memory of learning, MiB", "variance of a sample's gradient over the squared mean"
    lengths, spreads = dict[int, float](), dict[int, float]()
    lengths[1], spreads[0] = gradients(Chain(), 1)  # no copies are those of one move
    lengths |= {k: gradients(Chain(), k)[0] for k in GROWTH_MOVES[1:]}
    spreads |= {n: gradients(RenoisedCopies(n), 1)[1] for n in COPIES[1:]}
    most, copies = GROWTH_MOVES[-1], COPIES[-1]
    measured = [
        *(Measurement(f"draft_{k}", "length of the mean gradient", length) for k, length in lengths.items()),
        Measurement(
            f"draft_{most}_over_1", "length of the mean gradient, over that of one move", lengths[most] / lengths[1]
        ),
        *(Measurement(f"draft_{k}.memory", memory, learning_memory(k)) for k in GROWTH_MOVES),
        *(
            Measurement(f"draft_{k}.memory_kept", f"{memory}, without recomputation", memory_of_kept_graphs(k))
            for k in GROWTH_MOVES
        ),
        *(Measurement(f"draft_lv_{n}", variance, spread) for n, spread in spreads.items()),
        Measurement(f"draft_lv_{copies}_over_0", f"{variance}, over that without copies", spreads[copies] / spreads[0]),
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
    """Mixtures of two LoRAs with planted tastes: what each of five scores by both, and how that changes on the way."""
    every = compared(work / "tastes", "shapes_tastes", allow_failed=True)
    runs, config = finished(every), work / "tastes-evaluation.json"
    write_json(config, soup_evaluation(work / "soups"))
    records: list[PromptRecord] = []
    for seed in sorted(runs["red"].keys() & runs["bright"].keys()):
        front = work / "soups" / f"seed-{seed}"
        adapters = json.dumps([str(runs[name][seed]) for name in ("red", "bright")])
        run_genalign("soup", "--adapters", adapters, "--evaluate", str(config), "--output", str(front))
        records += front_records(seed, {path.name: load_evaluation(path / "evaluation") for path in shares(front)})
    records.sort(key=lambda record: record.name)
    claim = (
        "Mixtures of a LoRA that makes images red (share 0) and one that makes them bright (share 1) by both tastes:"
        " beside the first alone, beside the mixture before, and in the middle beside the mean of both ends"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py soup")
    write_results(RESULTS, "soup_shapes", {**header, "failed": stopped(every)}, records)


def soup_evaluation(output: Path) -> dict[str, Any]:
    """The configuration of ``genalign evaluate prompts`` by which mixtures are evaluated, each in its own folder."""
    base = yaml.safe_load((COMPARISONS / "base_shapes.yaml").read_text(encoding="utf-8"))
    taste = "scripts.benchmarks.planted_rewards.Taste"
    return {
        "output": str(output),
        "model": base["model"],
        "prompts": "shapes:val",
        "rewards": {
            name: {"function": {"class_path": taste, "init_args": {"likes": likes}}} for name, likes in TASTES.items()
        },
        "sampling": base["evaluation"],
        "samples_per_task": 48,
        "seeds": 1,
        "batch_size": 96,
    }


def shares(front: Path) -> list[Path]:
    """The mixtures of a front, from the first adapter to the second."""
    return sorted(front.glob("share-*"))


def front_records(seed: int, front: Mapping[str, Evaluation]) -> list[PromptRecord]:
    """Both tastes of the mixtures of a front: beside the first, beside the one before, and the middle beside the ends.

    Args:
        seed: The training seed of the adapters.
        front: The evaluations by the names of the mixtures, from the first adapter to the second; their number is odd.
    """
    names, sides = list(front), list(front.values())
    records: list[PromptRecord] = []
    for taste in TASTES:
        from_first = [prompt_records(f"{name}.{taste}", taste, seed, sides[0], side) for name, side in front.items()]
        records += [row for rows in from_first[1:] for row in rows]
        for name, (before, after) in zip(names[1:], pairwise(sides), strict=True):
            step, metric = f"{name}.{taste}.step", f"{taste}, over the mixture before"
            records += [replace(row, metric=metric) for row in prompt_records(step, taste, seed, before, after)]
        for middle, end in zip(from_first[len(names) // 2], from_first[-1], strict=True):
            ends, metric = (middle.before + end.after) / 2, f"{taste}, over the mean of both ends"
            records.append(replace(middle, name=f"middle.{taste}", metric=metric, before=ends))
    return records


def audio_pathwise(work: Path) -> None:
    """A CLAP reward's gradient, and the best of a pool of clips, on sounds."""
    write_pool("tones", work / "tones_pool.jsonl", TONES_POOL)
    every = compared(work / "audio_pathwise", "tones_pathwise", allow_failed=True)
    runs = finished(every)
    records = arm_gains("draft.clap", "clap", "clap", runs["draft"])  # sft has no CLAP score
    for name, by_seed in runs.items():
        records += arm_gains(f"{name}.strict", "strict", "strict", by_seed)
    claim = (
        "CLAP score and strict accuracy (suite comp, ODE) after the gradient of a CLAP reward, and strict accuracy"
        " after SFT on a pool"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py audio_pathwise")
    write_results(RESULTS, "pathwise_tones", {**header, "failed": stopped(every)}, records)
