"""Comparison of two models: gains and win rates over the same prompts and noises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from genalign.evaluation.evaluate import Evaluation, load_evaluation
from genalign.evaluation.paired import SamplePair, gain, pairs, shared_scores, task_gains
from genalign.metrics.intervals import Estimate, WinRate, win_rate


@dataclass(frozen=True)
class ModelComparison:
    """The gain of each score, overall and by task, and how often the later model wins a prompt."""

    gain: Mapping[str, Estimate]
    tasks: Mapping[str, Mapping[str, Estimate]]
    wins: Mapping[str, WinRate]


def load_finished(folder: Path) -> Evaluation:
    """Load the evaluation in a folder. Raises FileNotFoundError for a missing or unfinished evaluation."""
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(f"{folder} has no finished evaluation: run genalign evaluate geneval on it to the end")
    return load_evaluation(folder)


def compare_models(before: Evaluation, after: Evaluation) -> ModelComparison:
    """Compare two evaluations with bootstrap intervals over prompts within tasks, and win rates of prompt means.

    Raises ValueError if their protocols, prompts or noises differ, or if a task has no pair of images that both could
    be judged.
    """
    matched = pairs(before, after)
    complete = [
        pair for pair in matched if all(map(math.isfinite, (*pair.before.scores.values(), *pair.after.scores.values())))
    ]
    if missing := {pair.before.task for pair in matched} - {pair.before.task for pair in complete}:
        raise ValueError(
            f"{len(matched) - len(complete)} of {len(matched)} pairs have an image that could not be judged, all of"
            f" task {', '.join(sorted(missing))} among them: such images are NaN, often of a model that overflows in"
            " float16; make them again in bfloat16 or float32"
        )

    wins = {}
    for name in shared_scores(before, after):
        prompts: dict[tuple[str, str], list[SamplePair]] = {}
        for pair in matched:
            if math.isfinite(pair.difference(name)):
                prompts.setdefault((pair.before.task, pair.before.prompt), []).append(pair)
        old = [math.fsum(pair.before.scores[name] for pair in group) / len(group) for group in prompts.values()]
        new = [math.fsum(pair.after.scores[name] for pair in group) / len(group) for group in prompts.values()]
        wins[name] = win_rate(old, new)
    return ModelComparison(gain(before, after), task_gains(before, after), wins)
