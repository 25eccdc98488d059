"""Paired comparison of two evaluations: samples of the same prompt and initial noise, before and after."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord
from genalign.evaluation.scorers import RECOGNIZED
from genalign.metrics.intervals import Estimate, WinRate, difference_kind, effect_size, mean_over_tasks, win_rate


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

    @property
    def recognized_before(self) -> bool | None:
        """Whether the verifier recognized everything before; None where it does not say."""
        return _recognition(self.before)[1]

    @property
    def became_correct(self) -> bool:
        """Whether the score of that verifier rises to 1, all that the prompt asks for."""
        name, _ = _recognition(self.before)
        return self.before.scores.get(name, 1) < self.after.scores.get(name, 0) == 1

    @property
    def content_repaired(self) -> bool:
        """Whether the sample became correct without removal of noise: the verifier recognized everything before."""
        return self.became_correct and bool(self.recognized_before)


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
    return _estimates(pairs(before, after))


def task_gains(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Estimate]]:
    """Estimate each score's mean gain within each task, paired by prompt and noise."""
    tasks: dict[str, list[SamplePair]] = {}
    for pair in pairs(before, after):
        tasks.setdefault(pair.before.task, []).append(pair)
    return {task: _estimates(group) for task, group in tasks.items()}


def effect_sizes(before: Evaluation, after: Evaluation) -> dict[str, float]:
    """Divide each score's mean gain by the standard deviation of the score over prompts."""
    matched = pairs(before, after)
    return {name: effect_size(gain.mean, _means(matched, name)) for name, gain in _estimates(matched).items()}


def pairs_by_gain(before: Evaluation, after: Evaluation) -> tuple[SamplePair, ...]:
    """Sort pairs by gain, worst regression first: by the first score, then by the next; pairs with NaN are left out."""
    gains = [(tuple(pair.differences.values()), pair) for pair in pairs(before, after)]
    finite = [item for item in gains if all(map(math.isfinite, item[0]))]
    return tuple(pair for _, pair in sorted(finite, key=lambda item: item[0]))


@dataclass(frozen=True)
class NewlyCorrect:
    """The number of ``pairs`` whose sample became correct, and of those in which everything was ``recognized`` before.

    In the latter the content was corrected, such as a color, a number or a place; in the others something was there
    that a verifier does not know, such as noise, or nothing at all.
    """

    pairs: int
    recognized: int

    @property
    def share(self) -> float:
        """The fraction of the pairs that were recognized before; NaN for no pairs."""
        return self.recognized / self.pairs if self.pairs else math.nan

    def as_dict(self) -> dict[str, float | None]:
        """Return the counts as JSON types, null for no share."""
        return {"pairs": self.pairs, "recognized_before": self.recognized, "share": self.share if self.pairs else None}


def newly_correct(pairs: Sequence[SamplePair]) -> NewlyCorrect | None:
    """Count the samples that became correct; None where no scorer says what it recognizes."""
    if all(pair.recognized_before is None for pair in pairs):
        return None
    return NewlyCorrect(sum(pair.became_correct for pair in pairs), sum(pair.content_repaired for pair in pairs))


def gallery_improvements(by_gain: Sequence[SamplePair], seed: int = 0) -> list[SamplePair]:
    """Order the pairs that improved for a gallery: first those that became correct and were recognized before.

    These are shuffled by ``seed``, so nobody selects them; the others follow, the largest gain first.

    Args:
        by_gain: Pairs as ``pairs_by_gain`` sorts them.
        seed: The seed of the order.
    """
    improved = [pair for pair in reversed(by_gain) if first_difference(pair) > 0]
    repaired = sorted((pair for pair in improved if pair.content_repaired), key=lambda pair: pair.before.key)
    random.Random(seed).shuffle(repaired)
    return [*repaired, *(pair for pair in improved if not pair.content_repaired)]


def first_difference(pair: SamplePair) -> float:
    """The first difference that is not zero, by which pairs are sorted; 0 where there is none."""
    return next((difference for difference in pair.differences.values() if difference), 0.0)


def _recognition(record: SampleRecord) -> tuple[str, bool | None]:
    """The name of the first scorer that says whether it recognizes everything in a sample, and its answer."""
    for name, detail in record.details.items():
        if isinstance(detail, Mapping) and RECOGNIZED in detail:
            return name, bool(detail[RECOGNIZED])
    return "", None


def gain_record(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Return a gain as JSON types: of each score, overall and by task, and the samples that became correct."""
    by_task, right = task_gains(before, after), newly_correct(pairs_by_gain(before, after))
    return {
        "gain": {name: estimate.as_dict() for name, estimate in gain(before, after).items()},
        "tasks": {task: {name: e.as_dict() for name, e in gains.items()} for task, gains in by_task.items()},
        "newly_correct": right.as_dict() if right else None,
    }


@dataclass(frozen=True)
class ModelComparison:
    """The gain of each score, overall and by task, its effect size, and how often the later model wins a prompt."""

    gain: Mapping[str, Estimate]
    tasks: Mapping[str, Mapping[str, Estimate]]
    wins: Mapping[str, WinRate]
    effects: Mapping[str, float]


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
    gains, wins = _estimates(matched), {}
    for name in gains:
        wins[name] = win_rate(*zip(*_means(matched, name), strict=True))
    return ModelComparison(gains, task_gains(before, after), wins, effect_sizes(before, after))


def _estimates(matched: Sequence[SamplePair]) -> dict[str, Estimate]:
    """Estimate the mean gain of every score that both sides have. Raises ValueError for a task without both scores."""
    estimates = {}
    for name in matched[0].differences if matched else ():
        tasks = _prompt_means(matched, name)
        values = {side.scores[name] for pair in matched for side in (pair.before, pair.after)}
        finite = {value for value in values if math.isfinite(value)}
        kind = difference_kind(_means(matched, name), finite <= {0, 1})
        gains = {task: [new - old for old, new in prompts.values()] for task, prompts in tasks.items()}
        if empty := [task for task, prompts in tasks.items() if not prompts]:
            raise ValueError(f"{name!r} has no pair of samples with both scores in task {empty[0]!r}: it has no gain")
        estimates[name] = mean_over_tasks(gains, kind)
    return estimates


def _means(matched: Sequence[SamplePair], name: str) -> list[tuple[float, float]]:
    """The mean score before and after of every prompt."""
    return [mean for prompts in _prompt_means(matched, name).values() for mean in prompts.values()]


def _prompt_means(matched: Sequence[SamplePair], name: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Average a score over the pairs of each prompt that have both scores: (before, after) by task and prompt."""
    tasks: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for pair in matched:
        prompts = tasks.setdefault(pair.before.task, {})
        if math.isfinite(pair.differences[name]):
            scores = pair.before.scores[name], pair.after.scores[name]
            prompts.setdefault(pair.before.prompt, []).append(scores)
    return {
        task: {
            prompt: (math.fsum(old for old, _ in rows) / len(rows), math.fsum(new for _, new in rows) / len(rows))
            for prompt, rows in prompts.items()
        }
        for task, prompts in tasks.items()
    }
