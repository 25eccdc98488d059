"""``genalign reward evaluate``: how far a reward, or a judge of pairs, can be trusted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from genalign.cli import parsing
from genalign.cli.context import CommandContext, named_rewards, print_table, require_rate
from genalign.cli.generation_settings import RewardChoice
from genalign.cli.reward import named_settings, reward_version
from genalign.evaluation.report.reward_page import write_reward
from genalign.reward_learning.examples import Item
from genalign.reward_learning.item_scores import ItemReader, ItemScorer, ScoreFile
from genalign.reward_learning.judged_pairs import TRAINING_ITEMS, training_items
from genalign.reward_learning.preference_formats import read_all_preferences
from genalign.reward_learning.preferences import JudgedSample
from genalign.reward_learning.reward_evaluation import evaluate_judge, evaluate_reward
from genalign.reward_learning.reward_report import EvaluationOptions, RewardEvaluation
from genalign.runtime.files import write_json, write_text
from genalign.runtime.media import inside
from genalign.runtime.prompt_files import read_listing
from genalign.scoring.score import NamedReward
from genalign.types import AnyCallable

_SCORES = "scores.jsonl"
_NAMES = frozenset({"reward", "truth", "ratings", "rankings"})


@dataclass(frozen=True)
class RewardEvaluate:
    """Measures of a reward on preferences, or on samples with ground truth: MODULE:CLASS, parameters as --args.NAME.

    Accuracy by dimension, margin, subset and generators; calibration; best of n and ranks against ground truth;
    distances of rewards; nuisances; robustness; position bias; agreement with annotators; pairs that it was trained on.
    The output has evaluation.json, pairs.jsonl and report.html; the same command again resumes.

    Args:
        reward: Import path of the reward; ``--args.NAME`` sets its parameters.
        output: Folder to write.
        preferences: A folder with a preferences.jsonl or .parquet files, a file of judgments, or a list of these.
        samples: A folder of PNG, JPEG, WAV or FLAC files with a prompts.jsonl, several of each prompt, for best of n,
            ranks, distances and nuisances; null takes the samples of the preferences.
        truth: Import path of a reward that gives the ground truth, such as a verifier; null takes the ratings or
            rankings of the preferences.
        others: Other named rewards, whose distances are measured.
        pairwise: The reward is a judge of pairs: it takes two batches and their prompts, and returns probabilities that
            the first sample is better. It judges both orders.
        trained_on: The list of the items that the reward was trained on, training_items.json; null looks for one beside
            the files among the reward's parameters.
        measure: What is measured.
        size: Side in pixels to which images are resized; null keeps their size.
        batch_size: Number of samples per call.
        device: Torch device of the samples.
    """

    reward: AnyCallable
    output: str
    preferences: str | list[str] | None = None
    samples: str | None = None
    truth: AnyCallable | None = None
    others: dict[str, RewardChoice] = field(default_factory=dict)
    pairwise: bool = False
    trained_on: str | None = None
    measure: EvaluationOptions = field(default_factory=EvaluationOptions)
    size: int | None = None
    batch_size: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.preferences is None and (self.samples is None or self.truth is None):
            raise ValueError("nothing to measure on: give preferences (judgments), or samples and their truth")
        if self.pairwise and (self.preferences is None or self.samples or self.truth or self.others):
            raise ValueError("a judge of pairs is measured only on preferences: leave out samples, truth and others")
        if taken := sorted(_NAMES & self.others.keys()):
            raise ValueError(f"others.{taken[0]} is a reserved name: choose another")


def reward_evaluate_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign reward evaluate MODULE:CLASS``: measure, print a table and write the output's files."""
    command = "reward evaluate"
    settings, plain = parsing.parse(RewardEvaluate, named_settings(arguments, command), command)
    output = Path(settings.output)
    name, version = reward_version(plain["reward"])
    judgments = [] if settings.preferences is None else read_all_preferences(settings.preferences)
    samples = _listed_items(Path(settings.samples)) if settings.samples else []
    _require_same(output, plain, version)
    # All samples are read like the first one, whose sample rate the rewards must accept
    _, rate = (samples[0].sample if samples else judgments[0].samples[0]).read_with_rate()
    require_rate({"reward": settings.reward, "truth": settings.truth, "others": settings.others}, rate)
    reader = ItemReader(settings.size, settings.device, rate)
    scorer = ItemScorer(reader, ScoreFile(output / _SCORES), settings.batch_size)
    trained_on = _trained_on(settings, plain["reward"])
    if settings.pairwise:
        report = evaluate_judge(scorer, settings.reward, "reward", judgments, trained_on, settings.measure)
    else:
        report = evaluate_reward(
            scorer,
            NamedReward("reward", settings.reward, score_batch=settings.batch_size),
            judgments,
            samples,
            NamedReward("truth", settings.truth, score_batch=settings.batch_size) if settings.truth else None,
            named_rewards(settings.others),
            trained_on,
            settings.measure,
        )
    write_text(output / "pairs.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in report.pairs))
    write_json(output / "evaluation.json", {"reward": name, "version": version, "settings": plain} | report.as_dict())
    _print(report)
    print(f"report: {write_reward(output / 'report.html', name, report, plain)}")
    return 0


def _listed_items(folder: Path) -> list[Item]:
    """Read the samples that a folder's prompts.jsonl lists. Raises FileNotFoundError if one is missing."""
    items = list[Item]()
    for name, prompt in read_listing(folder).items():
        sample = JudgedSample(inside(folder, name))
        items.append(Item(prompt, sample, sample.digest()))
    if not items:
        raise ValueError(f"{folder} lists no samples")
    return items


def _trained_on(settings: RewardEvaluate, reward: Any) -> frozenset[str] | None:
    """Read the digests of the items that the reward was trained on, if there is a list of them."""
    if settings.trained_on is not None:
        return training_items(Path(settings.trained_on))
    arguments = reward.get("init_args") or {} if isinstance(reward, Mapping) else {}
    path = arguments.get("path")
    if not isinstance(path, str):
        return None
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return training_items(folder) if (folder / TRAINING_ITEMS).is_file() else None


def _require_same(output: Path, plain: Mapping[str, Any], version: str) -> None:
    """Record the settings and the reward's version in the output. Raises ValueError if it has others."""
    whole = json.dumps([plain, version], sort_keys=True)
    identity = {"settings": plain, "version": version, "hash": hashlib.sha256(whole.encode()).hexdigest()[:12]}
    path, scores = output / "settings.json", output / _SCORES
    if not path.is_file() or not (scores.is_file() and scores.stat().st_size):
        write_json(path, identity)
    elif json.loads(path.read_text("utf-8"))["hash"] != identity["hash"]:
        raise ValueError(
            f"{output} holds an evaluation with other settings or another version of the reward, see its {path.name}:"
            " choose another output, or remove it"
        )


def _print(report: RewardEvaluation) -> None:
    """Print the measures by section, shares in percent, and notes on them."""
    rows = list[tuple[str, ...]]()
    for section, measures in report.sections().items():
        for place, one in enumerate(measures):
            value, form = one.value, ".1%" if one.is_share else ".3f"
            mean = format(value.mean, form) if math.isfinite(value.mean) else "infinite"
            bounds = value.low, value.high
            low, high = (format(bound, form) if math.isfinite(bound) else "unknown" for bound in bounds)
            interval = "-" if value.low == value.high or low == high == "unknown" else f"{low} to {high}"
            label = section if place == 0 else ""
            rows.append((label, escape(one.name), mean, interval, str(value.n), escape(one.counted)))
    print_table(("", "measure", "value", "95 % interval", "prompts", "of"), rows)
    for note in report.notes:
        print(note)
    print(", ".join(f"{count} {name}" for name, count in report.counts.items()))
