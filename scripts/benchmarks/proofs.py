"""Train what proves the claims, over seeds, and write docs/results.

    python scripts/benchmarks/proofs.py                 every part
    python scripts/benchmarks/proofs.py demo            one part

``guards`` and ``credits`` take up to 12 hours together; ``scripts/benchmarks/guards.py`` has their plan, and
``scripts/benchmarks/reward_gradients.py`` that of reward gradients. Finished seeds are saved
in runs/proofs; an interrupted proof resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from genalign.evaluation.records import PromptRecord
from genalign.metrics.image import saturation
from rewards.ratings import RatingReward
from rewards.shapes import recolored, rendered
from scripts.benchmarks import method_comparisons, offline_learning, put_to_use, reward_gradients
from scripts.benchmarks.audio_measures import Measure as Measurable
from scripts.benchmarks.audio_measures import TrainedRun, dragon_measures, measures, rewards_row
from scripts.benchmarks.audio_search import pruning_records
from scripts.benchmarks.few_steps import few_step_base, few_step_rewards, few_steps
from scripts.benchmarks.guards import credits_part, guards_part
from scripts.benchmarks.overoptimization import overoptimization
from scripts.benchmarks.personal_tastes import users_part
from scripts.benchmarks.planted_ratings import rated_scenes, warmth
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.set_measures import (
    FEATURES,
    Measure,
    is_cold,
    is_purple,
    is_small,
    mean_of,
    mean_saturation,
    nearness,
    patch_nearness,
    set_records,
    share,
    variety,
)
from scripts.benchmarks.trained_runs import (
    RESULTS,
    alarm_and_fall,
    arm_gains,
    compared,
    gains,
    hacking_reports,
    head,
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
    """Write the demo's gains, overall and by task, and how many of its right samples were wrong in content before."""
    records: list[PromptRecord] = []
    for seed in SEEDS:
        run = work / part / f"seed-{seed}"
        if not (run / "gain.json").exists():
            run_genalign("demo", world, "--output", str(run), "--training.seed", str(seed), "--resume")
        strict = gains("demo", "strict", "strict", seed, run)
        records += strict + gains("demo.partial", "partial", "partial", seed, run)
        records += [replace(record, name=f"demo.{record.task}") for record in strict]
        right = json.loads((run / "gain.json").read_text(encoding="utf-8"))["newly_correct"]
        if right and right["pairs"]:
            metric = "share of newly correct images that showed only recognizable shapes before"
            records.append(PromptRecord("demo.content", metric, seed, "all", "the whole run", 0.0, right["share"], 1))
    records.sort(key=lambda record: record.name)
    claim = f"The demo raises strict accuracy on held-out compositions ({world}, suite comp)"
    header = head(claim, f"python scripts/benchmarks/proofs.py {part}")
    write_results(RESULTS, f"demo_{world}", header, records)


@torch.no_grad()
def dragon(work: Path) -> None:
    """DRAGON on images, by references, words and ratings, and on variety beside accuracy."""
    runs, vendi = compared(work / "dragon", "shapes_dragon"), compared(work / "variety", "shapes_variety")["vendi"]
    references = recolored(("purple",), radius=(5.5, 7.5), seed=1)  # others than those of training
    near, by_patches = nearness(references), patch_nearness(references)
    by_raters = RatingReward(FEATURES, rated_scenes(seed=1))  # others than those of training
    distance, of_shapes = "less distance", "share of shapes"
    purple_and_small = [("purple", of_shapes, share(is_purple)), ("small", of_shapes, share(is_small))]
    both = [("clip", "less distance by CLIP", near), ("vae", "less distance by the VAE", by_patches)]
    looked_at: dict[str, list[tuple[str, str, Measure]]] = {
        "frechet": [("", distance, near), *both[1:], *purple_and_small],
        "vae_frechet": [("", distance, by_patches), *both[:1], *purple_and_small],
        "vae_frechet_image": [("", distance, by_patches), *both[:1], *purple_and_small],
        "words": [("", "share of purple and blue shapes", share(is_cold))],
        "rating": [("", "rating by other raters", mean_of(by_raters)), ("taste", "true rating", mean_of(warmth))],
    }
    records: list[PromptRecord] = []
    for name, looks in looked_at.items():
        for seed, run in runs[name].items():
            for part, metric, measure in looks:
                records += set_records(f"dragon_{name}{part and '.'}{part}", metric, seed, run, measure)
            records += gains(f"dragon_{name}.strict", "strict", "strict", seed, run)
    for seed, run in vendi.items():
        records += set_records("dragon_vendi", "Vendi score", seed, run, variety)
        records += gains("dragon_vendi.strict", "strict", "strict", seed, run)
    claim = (
        "DRAGON on images: towards references of small purple objects by CLIP and by the model's own VAE, of sets and"
        " of single images; towards purple and blue in words; towards the colors that raters like; and towards variety"
    )
    write_results(RESULTS, "dragon_shapes", head(claim, "python scripts/benchmarks/proofs.py dragon"), records)


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
        "A reward with a planted preference for saturation lowers strict accuracy when frozen and raises it when"
        " trained"
        " against references; a discriminator of recolored references brings the model nearer to them"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py adversarial")
    write_results(RESULTS, "adversarial_shapes", {**header, "reference_saturation": [low, high]}, records)


def hacking(work: Path) -> None:
    """The alarm comes before a planted reward has cost a tenth of the strict accuracy, and never in honest runs."""
    runs = compared(work / "hacking", "shapes_hacking")
    records: list[PromptRecord] = []
    for seed, run in runs["planted"].items():
        alarm, fall = alarm_and_fall(run, "strict")
        records.append(PromptRecord("alarm_lead", "rounds", seed, "all", "the whole run", alarm, fall, 1))
    for seed, run in runs["honest"].items():
        alarms = float(sum(bool(report.alarm) for _, report in hacking_reports(run)))
        records.append(PromptRecord("honest_alarms", "alarms", seed, "all", "the whole run", 0.0, alarms, 1))
        records += gains("honest.strict", "strict", "strict", seed, run)
    claim = (
        "The alarm, which reads no verifier, comes before a reward with a planted preference for red has cost a tenth"
        " of the held-out strict accuracy, and never while an honest reward raises it"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py hacking")
    write_results(RESULTS, "hacking_shapes", header, records)


def hypernetworks(work: Path) -> None:
    """Gates of the state and of the prompt, beside the plain LoRA, and a noise hypernetwork on four steps."""
    runs = compared(work / "hypernetworks", "shapes_hypernetworks")
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        records += arm_gains(name, "redness", "red", by_seed) + arm_gains(f"{name}.strict", "strict", "strict", by_seed)
    for seed, run in runs["noise"].items():
        alarms = float(sum(bool(report.alarm) for _, report in hacking_reports(run)))
        records.append(PromptRecord("noise_alarms", "alarms", seed, "all", "the whole run", 0.0, alarms, 1))
    claim = (
        "LoRAs with a hypernetwork, of the state and of the prompt, raise an exact reward above the base model's; so"
        " does a noise hypernetwork on four steps, with as many steps, and how often the alarm of reward hacking comes"
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
    """On sounds: policy gradient and DRAGON raise strict accuracy, and DRAGON moves what its rewards of sets say."""
    trained = compared(work / "audio", "tones_methods")
    records = pruning_records(work / "audio_search")
    heard, table = audio_gains(trained, measures(), AUDIO_TARGETS)
    claim = (
        "On audio, DRAGON raises held-out strict accuracy (suite comp, ODE); it brings clips closer to references of"
        " quiet organ tones (FAD of frames, of sets and by clip; in words, by CLAP), and raises the Vendi score, where"
        " strict accuracy shows no change; noise-aware pruning finds more of its selection reward than"
        " best-of-N at equal cost in seconds"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py audio")
    write_results(RESULTS, "audio_tones", {**header, "win_rates": table}, heard + records)


def audio_dragon(work: Path) -> None:
    """DRAGON's own claims on sounds: every run wins by the reward that it trains on, in the form of its table 1."""
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
    trained: dict[str, dict[int, Path]], metrics: Mapping[str, Measurable], targets: Mapping[str, str]
) -> tuple[list[PromptRecord], list[dict[str, Any]]]:
    """The records of every recipe's target and of an accuracy beside it, and DRAGON's table 1."""
    records: list[PromptRecord] = []
    table: list[dict[str, Any]] = []
    for name, target in targets.items():
        heard = [TrainedRun.of(run, seed) for seed, run in trained[name].items()]
        beside = "partial" if target == "strict" else "strict"
        for run in heard:
            records += metrics[target].records(name, run) + metrics[beside].records(f"{name}.{beside}", run)
        table.append(rewards_row(name, metrics[target], heard, metrics))
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
    for part in options.parts or PARTS:
        PARTS[part](options.work)


if __name__ == "__main__":
    main()
