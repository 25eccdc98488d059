"""The page of a front: what mixtures of two adapters score, from one to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from genalign.evaluation.report.curves import Axis, Point, crosses_chart, interval_of, line_chart
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.words import SHARES, number, percent, plain, possible
from genalign.metrics.intervals import Estimate

_CHARTS = 6  # of pairs of scores, on a page


@dataclass(frozen=True)
class FrontPoint:
    """A mixture: the ``share`` of the second adapter, and the estimate of each score."""

    share: float
    scores: Mapping[str, Estimate]

    def as_dict(self) -> dict[str, Any]:
        """Return the share and the estimates as JSON types."""
        return {"share": self.share, "scores": {name: one.as_dict() for name, one in self.scores.items()}}


def write_front(path: Path, points: Sequence[FrontPoint], adapters: Sequence[str]) -> Path:
    """Write one offline HTML page of a front, and return its path.

    Args:
        path: The file.
        points: The mixtures, by their share.
        adapters: The names of both adapters.
    """
    names = list(points[0].scores)
    estimates = {name: [possible(name, point.scores[name], least=0.0) for point in points] for name in names}

    # Each score against the share of the second adapter, and pairs of scores against each other with both intervals
    charts, fronts = {}, {}
    for name, own in estimates.items():
        marks = [Point(p.share, one.mean, interval_of(one)) for p, one in zip(points, own, strict=True)]
        share = Axis("share of the second adapter", number)
        charts[name] = line_chart(marks, share, _axis(name), f"{plain(name)} score")
    for first, second in list(combinations(names, 2))[:_CHARTS]:
        across = [interval_of(one) for one in estimates[first]]
        both = zip(estimates[first], estimates[second], strict=True)
        marks = [Point(one.mean, other.mean, interval_of(other)) for one, other in both]
        title = f"{plain(second)} against {plain(first)}"
        fronts[title] = crosses_chart(marks, across, _axis(first), _axis(second))
    return write_page(
        path,
        "front.html.j2",
        adapters=list(adapters),
        shares=[point.share for point in points],
        scores=estimates,
        charts=charts,
        fronts=fronts,
    )


def _axis(name: str) -> Axis:
    return Axis(plain(name), percent if name in SHARES else number)
