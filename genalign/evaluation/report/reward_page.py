"""The page about a reward: how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genalign.evaluation.report.curves import Axis, Point, interval_of, line_chart, line_color, lines_chart, whisker
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.sections import flattened
from genalign.evaluation.report.words import count, number, percent
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
SHARE = Axis("accuracy", percent, limits=(0.0, 1.0))

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
    """A figure with its title and caption, and the colors of its lines by name, where they are several."""

    title: str
    caption: str
    figure: Markup
    lines: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_lines(
        cls, title: str, caption: str, series: Mapping[str, Sequence[Point]], x_axis: Axis, y_axis: Axis
    ) -> RewardChart:
        """Draw several lines, of which those without a point are left out."""
        drawn = {name: points for name, points in series.items() if points}
        colors = {name: line_color(place) for place, name in enumerate(drawn)}
        return cls(title, caption, lines_chart(drawn, x_axis, y_axis, title), colors)


def write_reward(path: Path, name: str, report: RewardEvaluation, settings: Mapping[str, Any]) -> Path:
    """Write one offline HTML page about the measures of a reward, and return its path.

    Args:
        path: The file.
        name: The import path of the reward.
        report: The measures.
        settings: The settings of the evaluation, as JSON types.
    """
    sections = {section: measure_rows(measures) for section, measures in report.sections().items()}
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


def measure_rows(measures: Sequence[RewardMeasure]) -> list[MeasureRow]:
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
        charts.append(reliability_chart(report.bins))
    margins = [one for one in report.measures if one.section == "accuracy by margin"]
    if len(margins) > 1:
        points = [Point(place, one.value.mean, interval_of(one.value)) for place, one in enumerate(margins, start=1)]
        figure = line_chart(points, Axis("bins of the margin, from small", count, whole=True), SHARE, "Accuracy")
        caption = f"bins of margins {', '.join(one.name for one in margins)}"
        charts.append(RewardChart("Accuracy by margin", caption, figure))
    return charts


def _best_of_n(curve: BestOfNCurve) -> list[RewardChart]:
    """Draw truth and score of the best of n against the square root of the KL divergence."""
    axis = Axis("square root of KL (nats)", number)
    charts = []
    for title, caption, values in (
        ("Truth of the best of n", "of the samples with the highest score", curve.truth),
        ("Score of the best of n", "by the reward itself", curve.scores),
    ):
        points = [Point(math.sqrt(kl), one.mean, interval_of(one)) for kl, one in zip(curve.kl, values, strict=True)]
        ends = f"n from 1 to {len(curve)}; KL = log n - (n - 1) / n"
        figure = line_chart(points, axis, Axis("", number), title)
        charts.append(RewardChart(title, f"{caption}; {ends}", figure))
    return charts


def reliability_chart(bins: Sequence[CalibrationBin]) -> RewardChart:
    """Draw accuracy against confidence, beside the diagonal of a calibrated reward."""
    measured = [Point(one.confidence, one.accuracy.mean, interval_of(one.accuracy)) for one in bins]
    ends = [Point(value, value) for value in (bins[0].confidence, bins[-1].confidence)]
    caption = "how often the preferred sample is right, by the probability that the scores give it"
    series = {"measured": measured, "calibrated": ends}
    return RewardChart.of_lines("Calibration", caption, series, Axis("confidence", percent), SHARE)
