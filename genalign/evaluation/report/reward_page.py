"""The page about a reward: how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genalign.evaluation.report.curves import Axis, Point, line_chart, lines_chart, whisker
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.sections import flattened
from genalign.evaluation.report.words import count, number, percent
from genalign.metrics.intervals import Estimate
from genalign.reward_learning.measures import BestOfNCurve
from genalign.reward_learning.pair_measures import CalibrationBin
from genalign.reward_learning.reward_report import RewardEvaluation, RewardMeasure

_HEADLINE = (
    ("accuracy", "without ties", "accuracy"),
    ("calibration", "expected calibration error", "calibration error"),
    ("order within prompts", "Kendall's tau-b", "Kendall's tau-b"),
    ("best of n", None, None),
    ("nuisances", "explained share of the variance", "explained by nuisances"),
    ("position bias", "judge", "position bias"),
)
_DRAWN = frozenset({"nuisances", "nuisances of the truth", "position bias"})  # with a line for each value


@dataclass(frozen=True)
class MeasureRow:
    """A measure as a page shows it."""

    name: str
    value: str
    interval: str
    prompts: int
    counted: str
    whisker: Markup


@dataclass(frozen=True)
class RewardChart:
    """A figure with its title and caption."""

    title: str
    caption: str
    figure: Markup


def write_reward(path: Path, name: str, report: RewardEvaluation, settings: Mapping[str, Any]) -> Path:
    """Write one offline HTML page about the measures of a reward, and return its path.

    Args:
        path: The file.
        name: The import path of the reward.
        report: The measures.
        settings: The settings of the evaluation, as JSON types.
    """
    sections = {section: _rows(measures) for section, measures in report.sections().items()}
    return write_page(
        path,
        "reward.html.j2",
        reward=name,
        facts=_facts(report),
        notes=report.notes,
        charts=_charts(report),
        sections=sections,
        drawn=_DRAWN,
        counts={name: str(value) for name, value in report.counts.items()},
        details=flattened(dict(settings)),
    )


def _facts(report: RewardEvaluation) -> dict[str, str]:
    """The most important measures, with their values."""
    facts = dict[str, str]()
    for section, name, label in _HEADLINE:
        for one in report.measures:
            gain = name is None and one.section == section and one.name.startswith("gain")
            if gain or (one.section, one.name) == (section, name):
                facts[label or f"best of {len(report.best_of_n or ())}: {one.name}"] = _written(one, one.value.mean)
    return facts


def _rows(measures: Sequence[RewardMeasure]) -> list[MeasureRow]:
    """Write the measures of a section, with their intervals drawn on one axis."""
    bounds = [bound for one in measures for bound in (one.value.low, one.value.high) if math.isfinite(bound)]
    limits = min(bounds, default=0.0), max(bounds, default=0.0)
    rows = []
    for one in measures:
        value = one.value
        interval = f"{_written(one, value.low)} to {_written(one, value.high)}" if value.low < value.high else ""
        drawable = math.isfinite(value.mean) and limits[0] < limits[1]
        figure = whisker(value, limits, f"{one.name} {_written(one, value.mean)}") if drawable else Markup()
        rows.append(MeasureRow(one.name, _written(one, value.mean), interval, value.n, one.counted, figure))
    return rows


def _written(measure: RewardMeasure, value: float) -> str:
    """Write a value, a share in percent."""
    if not math.isfinite(value):
        return "unknown"
    return percent(value).replace("-", "\N{MINUS SIGN}") if measure.is_share else number(value)


def _charts(report: RewardEvaluation) -> list[RewardChart]:
    """Draw the best of n, the calibration, and the accuracy by margin, as far as they were measured."""
    charts = _best_of_n(report.best_of_n) if report.best_of_n else []
    if len(report.bins) > 1:
        charts.append(_reliability(report.bins))
    margins = [one for one in report.measures if one.section == "accuracy by margin"]
    if len(margins) > 1:
        points = [Point(place, one.value.mean, _interval(one.value)) for place, one in enumerate(margins, start=1)]
        figure = line_chart(points, Axis("bins of the margin, from small", count, whole=True), _SHARE, "Accuracy")
        caption = f"bins of margins {', '.join(one.name for one in margins)}"
        charts.append(RewardChart("Accuracy by margin", caption, figure))
    return charts


_SHARE = Axis("accuracy", percent, limits=(0.0, 1.0))


def _best_of_n(curve: BestOfNCurve) -> list[RewardChart]:
    """Draw truth and score of the best of n against the square root of the KL divergence."""
    axis = Axis("square root of KL (nats)", number)
    charts = []
    for title, caption, values in (
        ("Truth of the best of n", "of the samples with the highest score", curve.truth),
        ("Score of the best of n", "by the reward itself", curve.scores),
    ):
        points = [Point(math.sqrt(kl), one.mean, _interval(one)) for kl, one in zip(curve.kl, values, strict=True)]
        ends = f"n from 1 to {len(curve)}; KL = log n - (n - 1) / n"
        figure = line_chart(points, axis, Axis("", number), title)
        charts.append(RewardChart(title, f"{caption}; {ends}", figure))
    return charts


def _reliability(bins: Sequence[CalibrationBin]) -> RewardChart:
    """Draw accuracy against confidence, beside the diagonal of a calibrated reward."""
    measured = [Point(one.confidence, one.accuracy.mean, _interval(one.accuracy)) for one in bins]
    ends = [Point(value, value) for value in (bins[0].confidence, bins[-1].confidence)]
    axis = Axis("confidence", percent)
    figure = lines_chart({"measured": measured, "calibrated": ends}, axis, _SHARE, "Accuracy")
    caption = (
        "how often the preferred sample is right, by the probability that the scores give it, and a calibrated line"
    )
    return RewardChart("Calibration", caption, figure)


def _interval(estimate: Estimate) -> tuple[float, float] | None:
    return (estimate.low, estimate.high) if estimate.has_interval else None
