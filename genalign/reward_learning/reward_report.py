"""What was measured of a reward, and what was left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from genalign.metrics.intervals import Estimate
from genalign.reward_learning.measures import BestOfNCurve, UnmeasurableError
from genalign.reward_learning.pair_measures import CalibrationBin
from genalign.runtime.files import without_infinities


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured of a reward.

    Args:
        dimension: The dimension of the judgments that all but the accuracy by dimension is about; None takes
            "overall", or else the first.
        scale: What turns differences of scores into logits of a preference.
        bins: Number of bins of the calibration error.
        best_of: The largest n of best-of-n; None takes the median number of samples of a prompt.
        robustness: Number of pairs whose samples are perturbed; 0 for none.
        seed: Seed of the perturbations and of the bootstrap.
    """

    dimension: str | None = None
    scale: float = 1.0
    bins: int = 10
    best_of: int | None = None
    robustness: int = 64
    seed: int = 0


@dataclass(frozen=True)
class RewardMeasure:
    """A measure of a reward with its interval over prompts.

    Attributes:
        section: What it is about, such as "accuracy by subset".
        name: Its name in the section.
        value: The estimate; its n counts prompts.
        is_share: Whether it is a share, or a difference of two.
        counted: What it is of, such as "120 pairs".
    """

    section: str
    name: str
    value: Estimate
    is_share: bool = False
    counted: str = ""


@dataclass
class RewardEvaluation:
    """The measures of a reward.

    Attributes:
        measures: The measures, in the order of their sections.
        best_of_n: The truth of the best of n, if there is a truth and several samples of a prompt.
        bins: The bins of the calibration.
        counts: How many judgments, pairs, items and prompts there are, and how many could not be scored.
        notes: What was left out and what should be known, in sentences.
        pairs: A record of every pair, as JSON types.
    """

    measures: list[RewardMeasure] = field(default_factory=list)
    best_of_n: BestOfNCurve | None = None
    bins: tuple[CalibrationBin, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, section: str, name: str, value: Estimate, is_share: bool = False, counted: str = "") -> None:
        """Add a measure with the attributes of ``RewardMeasure``."""
        self.measures.append(RewardMeasure(section, name, value, is_share, counted))

    def sections(self) -> dict[str, list[RewardMeasure]]:
        """Group the measures by section, in order of first appearance."""
        sections = dict[str, list[RewardMeasure]]()
        for one in self.measures:
            sections.setdefault(one.section, []).append(one)
        return sections

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note the reason where the data do not allow what is measured inside the context."""
        try:
            yield
        except UnmeasurableError as error:
            self.notes.append(f"{what} is not measured: {error}")

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with null for what is not finite; without the pairs."""
        curve = self.best_of_n
        points = zip(curve.kl, curve.truth, curve.gain, curve.scores, strict=True) if curve else ()
        content: dict[str, Any] = {
            "measures": {
                f"{one.section}/{one.name}": one.value.as_dict() | ({"of": one.counted} if one.counted else {})
                for one in self.measures
            },
            "best_of_n": [
                {"n": n, "kl": kl, "truth": truth.as_dict(), "gain": gain.as_dict(), "score": score.as_dict()}
                for n, (kl, truth, gain, score) in enumerate(points, start=1)
            ],
            "calibration_bins": [one.as_dict() for one in self.bins],
            "counts": self.counts,
            "notes": self.notes,
        }
        plain: dict[str, Any] = without_infinities(content)
        return plain
