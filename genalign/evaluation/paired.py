"""Two evaluations, image by image."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from genalign.evaluation.evaluate import Evaluation, Protocol, Record, Value, by_task, estimate
from genalign.metrics.intervals import Estimate


@dataclass(frozen=True)
class Pair:
    """One prompt and noise, before and after."""

    before: Record
    after: Record

    def difference(self, score: str) -> float:
        """After minus before; NaN where either failed."""
        return self.after.scores[score] - self.before.scores[score]


def pairs(before: Evaluation, after: Evaluation) -> tuple[Pair, ...]:
    """The images of two evaluations side by side, in the order of ``before``.

    Raises:
        ValueError: the protocols differ, or the images are not the same prompts and noises.
    """
    check_protocols(before.protocol, after.protocol)
    matches = {record.key: record for record in after.records}
    unmatched = matches.keys() ^ {record.key for record in before.records}
    if unmatched:
        task, prompt, sample, _ = min(unmatched)
        raise ValueError(
            f"{len(unmatched)} images have no partner in the other evaluation, the first of them {prompt!r} ({task}), "
            f"sample {sample}: evaluate the same plan before and after"
        )
    return tuple(Pair(record, matches[record.key]) for record in before.records)


def check_protocols(before: Protocol, after: Protocol) -> None:
    """Raise ValueError, naming what differs, for two numbers made in different ways: they are not compared."""
    if before.hash == after.hash:
        return
    old, new = before.as_dict(), after.as_dict()
    names = [field.name for field in fields(Protocol) if old[field.name] != new[field.name]]
    differing = "; ".join(f"{name} is {old[name]!r} before and {new[name]!r} after" for name in names)
    raise ValueError(
        f"evaluations of different protocols cannot be compared: {differing}. Evaluate both by one protocol"
    )


def gain(before: Evaluation, after: Evaluation) -> dict[str, Estimate]:
    """After minus before of each score, paired by prompt and noise; ``n`` counts the pairs that were scored.

    Raises:
        ValueError: the protocols differ, or the images are not the same prompts and noises.
    """
    return {name: estimate(values) for name, values in _differences(before, after).items()}


def task_gains(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Estimate]]:
    """``gain`` within each task."""
    return by_task(_differences(before, after))


def ranked(before: Evaluation, after: Evaluation) -> tuple[Pair, ...]:
    """Pairs by after minus before, worst regression first: by the first score, ties by the next; no failed ones."""
    names = _shared_scores(before, after)
    differences = [(tuple(pair.difference(name) for name in names), pair) for pair in pairs(before, after)]
    scored = [item for item in differences if all(map(math.isfinite, item[0]))]
    return tuple(pair for _, pair in sorted(scored, key=lambda item: item[0]))


def worst(before: Evaluation, after: Evaluation, n: int) -> tuple[Pair, ...]:
    """The first ``n`` of ``ranked``."""
    return ranked(before, after)[:n]


def _shared_scores(before: Evaluation, after: Evaluation) -> list[str]:
    return [name for name in before.score_names if name in after.score_names]


def _differences(before: Evaluation, after: Evaluation) -> dict[str, list[Value]]:
    matched = pairs(before, after)
    return {
        name: [Value(pair.before.task, pair.before.prompt, pair.difference(name)) for pair in matched]
        for name in _shared_scores(before, after)
    }
