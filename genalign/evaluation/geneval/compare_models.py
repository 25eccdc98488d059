"""Two models side by side: gains and win rates over the same prompts and noises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import Evaluation, load_evaluation
from genalign.evaluation.paired import Pair, gain, pairs, task_gains
from genalign.metrics.intervals import Estimate, WinRate, win_rate


@dataclass(frozen=True)
class Paired:
    """After minus before, of each score and of each task and score, and how often the later model wins a prompt."""

    gain: Mapping[str, Estimate]
    tasks: Mapping[str, Mapping[str, Estimate]]
    wins: Mapping[str, WinRate]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def finished(folder: Path) -> Evaluation:
    """The evaluation in a folder. FileNotFoundError where there is none, or one that has not come to its end."""
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(f"{folder} has no finished evaluation: run genalign evaluate geneval on it to the end")
    return load_evaluation(folder)


def compared(before: Evaluation, after: Evaluation) -> Paired:
    """Intervals by a bootstrap over prompts within tasks; a win is of a prompt's mean over its images.

    Raises ValueError where the two were not made by one protocol from the same prompts and noises, or share no judged
    image of a task.
    """
    matched = pairs(before, after)
    _require_judged(matched)
    names = [name for name in before.score_names if name in after.score_names]
    wins = {name: _wins(matched, name) for name in names}
    return Paired(gain(before, after), task_gains(before, after), wins)


def _require_judged(matched: Sequence[Pair]) -> None:
    """Raise ValueError for a task none of whose images could be judged on both sides, as images of NaN cannot."""
    whole = [
        pair for pair in matched if all(map(math.isfinite, (*pair.before.scores.values(), *pair.after.scores.values())))
    ]
    judged = {pair.before.task for pair in whole}
    lost = sorted({pair.before.task for pair in matched} - judged)
    if lost:
        raise ValueError(
            f"{len(matched) - len(whole)} of {len(matched)} pairs have an image that could not be judged, all of task"
            f" {', '.join(lost)} among them: such images are NaN, often of a model that overflows in float16; make them"
            " again in bfloat16 or float32"
        )


def _wins(matched: tuple[Pair, ...], score: str) -> WinRate:
    prompts: dict[tuple[str, str], list[Pair]] = {}
    for pair in matched:
        if math.isfinite(pair.difference(score)):
            prompts.setdefault((pair.before.task, pair.before.prompt), []).append(pair)
    old = [math.fsum(pair.before.scores[score] for pair in made) / len(made) for made in prompts.values()]
    new = [math.fsum(pair.after.scores[score] for pair in made) / len(made) for made in prompts.values()]
    return win_rate(old, new)
