"""Train what proves the claims, over seeds, and write docs/results.

    python scripts/benchmarks/proofs.py                 every part
    python scripts/benchmarks/proofs.py demo            one part

``guards`` and ``credits`` take up to 12 hours together; ``scripts/benchmarks/guards.py`` has their plan, and
``scripts/benchmarks/reward_gradients.py`` that of reward gradients. Finished seeds are saved
in runs/proofs; an interrupted proof resumes where it stopped. ``finalists``, and so all parts at once, are refused
before the winners of ``methods`` are in their file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from genalign.cli import parsing
from genalign.cli.demo import DEMOS
from genalign.cli.resume import require_unchanged
from genalign.cli.train_settings import Train
from genalign.evaluation.records import PromptRecord
from genalign.metrics.image import saturation
from rewards.shapes import recolored, rendered
from scripts.benchmarks import method_comparisons, offline_learning, put_to_use, reward_gradients
from scripts.benchmarks.audio_measures import Measure as Measurable
from scripts.benchmarks.audio_measures import TrainedRun, dragon_measures, measures, rewards_row
from scripts.benchmarks.audio_search import budget_shares, pruning_records
from scripts.benchmarks.base_weights import require_base
from scripts.benchmarks.few_steps import few_step_base, few_step_rewards, few_steps
from scripts.benchmarks.guards import credits_part, guards_part
from scripts.benchmarks.overoptimization import overoptimization
from scripts.benchmarks.personal_tastes import users_part
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.set_measures import LOOKS, image_measures, mean_saturation, nearness, set_records, wins_row
from scripts.benchmarks.trained_runs import (
    RESULTS,
    alarm_and_fall,
    arm_gains,
    compared,
    gains,
    gate_spread,
    hacking_reports,
    head,
    metrics,
    run_genalign,
)

SEEDS = (11, 12, 13)  # settings were chosen on seeds 0, 1, 100 and 101


def demo(work: Path) -> None:
    """``make demo``, with three seeds."""
    _demo(work, "shapes", "demo")


def audio_demo(work: Path) -> None:
    """``make demo-audio``, with three seeds."""
    _demo(work, "tones", "audio_demo")


def _demo(work: Path, world: str, part: str) -> None:
    """Write the gains of a demo, overall, by task and by seed, its minutes, and what newly correct samples showed."""
    runs, whole = {seed: _trained_demo(work / part, world, seed) for seed in SEEDS}, ("all", "the whole run", 0.0)
    records: list[PromptRecord] = []
    for seed, run in runs.items():
        strict = gains("demo", "strict", "strict", seed, run)
        records += strict + gains("demo.partial", "partial", "partial", seed, run)
        records += [replace(record, name=f"demo.{record.task}") for record in strict]
        records += [replace(record, name=f"demo.seed-{seed}") for record in strict]
        training, minutes = demo_minutes(run)
        metric = "minutes of training, with the evaluations between rounds"
        records.append(PromptRecord("demo.training_minutes", metric, seed, *whole, training, 1))
        metric = "minutes from the evaluation before training to the end of that after it"
        records.append(PromptRecord("demo.minutes", metric, seed, *whole, minutes, 1))
        right = json.loads((run / "gain.json").read_text(encoding="utf-8"))["newly_correct"]
        if right and right["pairs"]:
            metric = "share of newly correct images that showed only recognizable shapes before"
            records.append(PromptRecord("demo.content", metric, seed, *whole, right["share"], 1))
    records.sort(key=lambda record: record.name)
    claim = f"Accuracy on held-out compositions before and after the demo ({world}, suite comp)"
    header = head(claim, f"python scripts/benchmarks/proofs.py {part}")
    write_results(RESULTS, f"demo_{world}", {**header, **method_comparisons.about({"demo": runs})}, records)


def _trained_demo(folder: Path, world: str, seed: int) -> Path:
    """The finished run of a demo; a missing one is trained. Exits for one of another base model or other settings."""
    run = folder / f"seed-{seed}"
    own = ["--output", str(run), "--training.seed", str(seed)]
    shipped = str(files("genalign.assets") / DEMOS[world])
    settings, plain = parsing.parse(Train, ["--config", shipped, *own], "train")
    require_base(folder, settings.model.path)
    if not (run / "gain.json").exists():
        run_genalign("demo", world, *own, "--resume")
    try:
        require_unchanged(run, settings, plain)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    return run


def demo_minutes(run: Path) -> tuple[float, float]:
    """The minutes of a run's training, with the evaluations between its rounds, and of the run with all evaluations."""
    rows, facts = metrics(run), json.loads((run / "environment.json").read_text(encoding="utf-8"))
    first, last = (datetime.fromisoformat(rows[place]["machine"]["time"]) for place in (0, -1))
    began, ended = map(datetime.fromisoformat, (facts["started"]["date"], facts["finished"]))
    training = rows[0]["machine"]["seconds"] + (last - first).total_seconds()
    return training / 60, (ended - began).total_seconds() / 60


def dragon(work: Path) -> None:
    """DRAGON on images, by references, words and ratings, and on variety beside accuracy."""
    runs = compared(work / "dragon", "shapes_dragon") | compared(work / "variety", "shapes_variety")
    records, table = image_gains(runs)
    claim = (
        "DRAGON on images, by what each run trains on and by its accuracy: distances to small purple objects by CLIP"
        " and by the model's own VAE, of sets and of single images; to purple and blue in words; a reward fitted to"
        " ratings; and variety"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py dragon")
    write_results(RESULTS, "dragon_shapes", {**header, "win_rates": table}, records)


@torch.no_grad()
def image_gains(runs: Mapping[str, Mapping[int, Path]]) -> tuple[list[PromptRecord], list[dict[str, Any]]]:
    """The records of what every recipe moves and of its strict accuracy, and DRAGON's table 1."""
    measures = image_measures()
    records: list[PromptRecord] = []
    table: list[dict[str, Any]] = []
    for name, looks in LOOKS.items():
        for seed, run in runs[name].items():
            for part, metric in looks.items():
                row = f"dragon_{name}{part and '.'}{part}"
                records += set_records(row, metric, seed, run, measures[metric])
            records += gains(f"dragon_{name}.strict", "strict", "strict", seed, run)
        target = next(iter(looks.values()))
        table.append(wins_row(f"dragon_{name}", target, runs[name], measures))
    return records, table


def adversarial(work: Path) -> None:
    """A reward that can be hacked, frozen and adversarial; and a style learned from pictures alone."""
    runs = compared(work / "adversarial", "shapes_adversarial")
    records: list[PromptRecord] = []
    for name in ("frozen", "adversarial"):
        for seed, run in runs[name].items():
            records += gains(name, "strict", "strict", seed, run)
            records += set_records(f"{name}.saturation", "mean saturation", seed, run, mean_saturation)
    near = nearness(recolored(("red", "orange", "yellow"), seed=1))
    for seed, run in runs["style"].items():
        records += set_records("style", "less distance", seed, run, near)
    references = rendered("train", seed=1).images
    low, high = saturation(references.load(range(len(references)))).quantile(torch.tensor([0.05, 0.95])).tolist()
    claim = (
        "Strict accuracy and saturation by a reward with a planted preference for saturation, frozen and learning from"
        " references; and the distance to recolored references by a discriminator of them"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py adversarial")
    write_results(RESULTS, "adversarial_shapes", {**header, "reference_saturation": [low, high]}, records)


def hacking(work: Path) -> None:
    """Alarms beside a reward with a planted preference, and how long before it costs a tenth; alarms in honest runs."""
    runs = compared(work / "hacking", "shapes_hacking")
    records: list[PromptRecord] = []
    for seed, run in runs["planted"].items():
        alarm, fall = alarm_and_fall(run, "strict")
        whole, rounds = (seed, "all", "the whole run"), len(metrics(run))
        records.append(PromptRecord("alarm_lead", "rounds", *whole, alarm, fall, 1))
        records.append(PromptRecord("planted_alarms", "runs with an alarm", *whole, 0.0, float(alarm < rounds), 1))
        records.append(PromptRecord("planted_falls", "runs that lost a tenth", *whole, 0.0, float(fall < rounds), 1))
    for seed, run in runs["honest"].items():
        alarms = float(sum(bool(report.alarm) for _, report in hacking_reports(run)))
        records.append(PromptRecord("honest_alarms", "alarms", seed, "all", "the whole run", 0.0, alarms, 1))
        records += gains("honest.strict", "strict", "strict", seed, run)
    claim = (
        "By how many rounds the alarm, which reads no verifier, comes before a reward with a planted preference for red"
        " has cost a tenth of the held-out strict accuracy (what does not come counts as one past the last round), how"
        " many runs had an alarm and how many such a loss, and the alarms beside honest rewards"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py hacking")
    write_results(RESULTS, "hacking_shapes", header, records)


def hypernetworks(work: Path) -> None:
    """Gates of the state and of the prompt, beside the plain LoRA, and a noise hypernetwork on four steps."""
    runs = compared(work / "hypernetworks", "shapes_hypernetworks")
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        records += arm_gains(name, "redness", "red", by_seed) + arm_gains(f"{name}.strict", "strict", "strict", by_seed)
    for name in ("state", "prompt"):
        for seed, run in runs[name].items():
            metric, spread = "spread of the gates over prompts and steps", gate_spread(run)
            records.append(PromptRecord(f"{name}.gates", metric, seed, "all", "the whole run", 0.0, spread, 1))
    for seed, run in runs["noise"].items():
        signals = (signal for _, report in hacking_reports(run) for signal in report.signals)
        red = float(sum(signal.name == "drift of features" and signal.status == "red" for signal in signals))
        metric = "reports with a red drift of features"
        records.append(PromptRecord("noise_red_drift", metric, seed, "all", "the whole run", 0.0, red, 1))
    claim = (
        "An exact reward before and after training a plain LoRA, LoRAs with gates of the state and of the prompt, and a"
        " noise hypernetwork on four steps; how far the gates move, and reports of red drift"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py hypernetworks")
    write_results(RESULTS, "hypernetworks_shapes", header, records)


AUDIO_TARGETS = {
    "ddpo": "strict",
    "dragon_instance": "strict",
    "dragon_fad": "fad",
    "dragon_fad_clip": "clip_fad",
    "dragon_text": "text",
    "vendi": "vendi",
}


def audio(work: Path) -> None:
    """On sounds: policy gradient and DRAGON by strict accuracy, DRAGON by rewards of sets, and noise-aware pruning."""
    trained = compared(work / "audio", "tones_methods")
    records = pruning_records(work / "audio_search")
    heard, table = audio_gains(trained, measures(), AUDIO_TARGETS)
    claim = (
        "Training and search on audio: held-out strict accuracy (suite comp, ODE) by policy gradient and DRAGON; DRAGON"
        " by distances to quiet organ tones (FAD of frames, of sets and by clip; in words, by CLAP) and by the Vendi"
        " score, with strict accuracy beside; and noise-aware pruning over best-of-N at equal cost in seconds"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py audio")
    extra = {"win_rates": table, "budget_shares": budget_shares(work / "audio_search")}
    write_results(RESULTS, "audio_tones", {**header, **extra}, heard + records)


def audio_dragon(work: Path) -> None:
    """DRAGON's own claims on sounds: every run by the reward that it trains on, in the form of its table 1."""
    trained = compared(work / "audio_dragon", "tones_dragon")
    heard, table = audio_gains(trained, dragon_measures(), {name: name for name in trained})
    claim = (
        "DRAGON on sounds by its own kinds of rewards (distances of sets and of clips to right clips, by the model's"
        " VAE and by CLAP; the CLAP score; a reward fitted to ratings), each alone"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py audio_dragon")
    write_results(RESULTS, "dragon_tones", {**header, "win_rates": table}, heard)


@torch.no_grad()
def audio_gains(
    trained: dict[str, dict[int, Path]], by_name: Mapping[str, Measurable], targets: Mapping[str, str]
) -> tuple[list[PromptRecord], list[dict[str, Any]]]:
    """The records of every recipe's target and an accuracy, and of a rating the taste; and DRAGON's table 1."""
    records: list[PromptRecord] = []
    table: list[dict[str, Any]] = []
    for name, target in targets.items():
        heard = [TrainedRun.of(run, seed) for seed, run in trained[name].items()]
        beside = ["partial" if target == "strict" else "strict", *(["taste"] if target == "rating" else [])]
        for run in heard:
            records += by_name[target].records(name, run)
            for other in beside:
                records += by_name[other].records(f"{name}.{other}", run)
        table.append(rewards_row(name, by_name[target], heard, by_name))
    return records, table


PARTS = {
    "demo": demo,
    "methods": method_comparisons.methods,
    "finalists": method_comparisons.finalists,
    "finalists_20_steps": method_comparisons.finalists_20_steps,
    "matching_losses": method_comparisons.matching_losses,
    "learning_rates": method_comparisons.learning_rates,
    "dragon": dragon,
    "adversarial": adversarial,
    "hacking": hacking,
    "hypernetworks": hypernetworks,
    "prompt_counts": method_comparisons.prompt_counts,
    "guards": guards_part,
    "credits": credits_part,
    "few_step_base": few_step_base,
    "few_steps": few_steps,
    "few_step_rewards": few_step_rewards,
    "pathwise": reward_gradients.pathwise,
    "pathwise_hacking": reward_gradients.pathwise_hacking,
    "pathwise_guards": reward_gradients.pathwise_guards,
    "gradient_growth": reward_gradients.gradient_growth,
    "offline": offline_learning.offline,
    "soup": reward_gradients.soup,
    "users": users_part,
    "overoptimization": overoptimization,
    "learned_rewards": put_to_use.learned_rewards,
    "overrated": put_to_use.overrated,
    "references": put_to_use.references,
    "learned_rewards_tones": put_to_use.learned_rewards_tones,
    "audio_demo": audio_demo,
    "audio": audio,
    "audio_dragon": audio_dragon,
    "audio_pathwise": reward_gradients.audio_pathwise,
}


def main() -> None:
    """Run the proofs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    parts = options.parts or list(PARTS)
    if "finalists" in parts:
        try:
            method_comparisons.require_finalists()
        except ValueError as error:
            parser.error(str(error))
    for part in parts:
        PARTS[part](options.work)


if __name__ == "__main__":
    main()
