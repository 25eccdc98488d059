"""Paired comparison of two evaluations: samples of the same prompt and initial noise, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord
from genalign.metrics.intervals import Estimate


@dataclass(frozen=True)
class SamplePair:
    """Two samples of one prompt and initial noise, by the model before and after."""

    before: SampleRecord
    after: SampleRecord

    def difference(self, score: str) -> float:
        """Return the score after minus before; NaN where either failed."""
        return self.after.scores[score] - self.before.scores[score]


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
    names = [field.name for field in fields(EvaluationProtocol) if old[field.name] != new[field.name]]
    differing = "; ".join(f"{name} is {old[name]!r} before and {new[name]!r} after" for name in names)
    raise ValueError(
        f"evaluations of different protocols cannot be compared: {differing}. Evaluate both by one protocol"
    )


def gain(before: Evaluation, after: Evaluation) -> dict[str, Estimate]:
    """Estimate each score's mean gain, paired by prompt and noise; ``n`` counts the pairs with both scores.

    Raises:
        ValueError: the protocols differ, or the samples are not of the same prompts and noises.
    """
    return _differences(before, after).overall


def task_gains(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Estimate]]:
    """Estimate each score's mean gain within each task, paired by prompt and noise."""
    return _differences(before, after).tasks


def pairs_by_gain(before: Evaluation, after: Evaluation) -> tuple[SamplePair, ...]:
    """Sort pairs by gain, worst regression first: by the first score, then by the next; pairs with NaN are left out."""
    names = shared_scores(before, after)
    gains = [(tuple(pair.difference(name) for name in names), pair) for pair in pairs(before, after)]
    finite = [item for item in gains if all(map(math.isfinite, item[0]))]
    return tuple(pair for _, pair in sorted(finite, key=lambda item: item[0]))


def _differences(before: Evaluation, after: Evaluation) -> Evaluation:
    """Replace the scores of the samples by their differences, after minus before."""
    names = shared_scores(before, after)
    scores = [(pair.before, {name: pair.difference(name) for name in names}) for pair in pairs(before, after)]
    return replace(before, records=tuple(replace(record, scores=row) for record, row in scores))


def shared_scores(before: Evaluation, after: Evaluation) -> list[str]:
    """Return the scores that both evaluations have, in the order of ``before``."""
    return [name for name in before.score_names if name in after.score_names]
