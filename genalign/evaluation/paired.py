"""Paired comparison of two evaluations: samples of the same prompt and initial noise, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord
from genalign.metrics.intervals import Estimate, WinRate, win_rate


@dataclass(frozen=True)
class SamplePair:
    """Two samples of one prompt and initial noise, by the model before and after."""

    before: SampleRecord
    after: SampleRecord

    @property
    def differences(self) -> dict[str, float]:
        """After minus before of each score that both have, in the order of ``before``; NaN where either failed."""
        after = self.after.scores
        return {name: after[name] - value for name, value in self.before.scores.items() if name in after}


def pairs(before: Evaluation, after: Evaluation) -> tuple[SamplePair, ...]:
    """Pair the samples of two evaluations by prompt and noise, in the order of ``before``.

    Raises:
        ValueError: the protocols differ, or the samples are not of the same prompts and noises.
    """
    check_protocols(before.protocol, after.protocol)
    matches = {record.key: record for record in after.records}
    unmatched = matches.keys() ^ {record.key for record in before.records}
    if unmatched:
        task, prompt, sample, _ = min(unmatched)
        raise ValueError(
            f"{len(unmatched)} samples are in only one of the evaluations, the first of them {prompt!r} ({task}), "
            f"sample {sample}: evaluate the same prompts and seeds before and after"
        )
    return tuple(SamplePair(record, matches[record.key]) for record in before.records)


def check_protocols(before: EvaluationProtocol, after: EvaluationProtocol) -> None:
    """Raise ValueError that names the differing settings unless two protocols are equal."""
    if before.hash == after.hash:
        return
    old, new = before.as_dict(), after.as_dict()
    names = [field.name for field in fields(EvaluationProtocol) if old.get(field.name) != new.get(field.name)]
    differing = "; ".join(f"{name} is {old.get(name)!r} before and {new.get(name)!r} after" for name in names)
    raise ValueError(
        f"evaluations of different protocols cannot be compared: {differing}. Evaluate both by one protocol"
    )


def gain(before: Evaluation, after: Evaluation) -> dict[str, Estimate]:
    """Estimate each score's mean gain, paired by prompt and noise; ``n`` counts the prompts with both scores.

    Raises:
        ValueError: the protocols differ, or the samples are not of the same prompts and noises.
    """
    return _differences(before, after).overall


def task_gains(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Estimate]]:
    """Estimate each score's mean gain within each task, paired by prompt and noise."""
    return _differences(before, after).tasks


def pairs_by_gain(before: Evaluation, after: Evaluation) -> tuple[SamplePair, ...]:
    """Sort pairs by gain, worst regression first: by the first score, then by the next; pairs with NaN are left out."""
    gains = [(tuple(pair.differences.values()), pair) for pair in pairs(before, after)]
    finite = [item for item in gains if all(map(math.isfinite, item[0]))]
    return tuple(pair for _, pair in sorted(finite, key=lambda item: item[0]))


@dataclass(frozen=True)
class ModelComparison:
    """The gain of each score, overall and by task, and how often the later model wins a prompt."""

    gain: Mapping[str, Estimate]
    tasks: Mapping[str, Mapping[str, Estimate]]
    wins: Mapping[str, WinRate]


def compare_models(before: Evaluation, after: Evaluation) -> ModelComparison:
    """Compare two evaluations with intervals over prompts, and win rates of prompt means.

    Raises ValueError if their protocols, prompts or noises differ, or if a task has no pair of images that both could
    be judged.
    """
    matched = pairs(before, after)
    complete = pairs_by_gain(before, after)
    if missing := {pair.before.task for pair in matched} - {pair.before.task for pair in complete}:
        raise ValueError(
            f"{len(matched) - len(complete)} of {len(matched)} pairs have an image that could not be judged, all of"
            f" task {', '.join(sorted(missing))} among them: such images are NaN, often of a model that overflows in"
            " float16; make them again in bfloat16 or float32"
        )
    differences, wins = _differences(before, after), {}
    for name in differences.score_names:
        prompts: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for pair in matched:
            if math.isfinite(pair.differences[name]):
                scores = pair.before.scores[name], pair.after.scores[name]
                prompts.setdefault((pair.before.task, pair.before.prompt), []).append(scores)
        means = [[math.fsum(side) / len(side) for side in zip(*group, strict=True)] for group in prompts.values()]
        wins[name] = win_rate(*zip(*means, strict=True))
    return ModelComparison(differences.overall, differences.tasks, wins)


def _differences(before: Evaluation, after: Evaluation) -> Evaluation:
    """Replace the scores of the samples by their differences, after minus before."""
    records = (replace(pair.before, scores=pair.differences) for pair in pairs(before, after))
    return replace(before, records=tuple(records), paired=True)
