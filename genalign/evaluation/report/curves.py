"""Small SVG figures as text: line charts with a band and a read-out, and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from genalign.evaluation.report.words import gain_mood
from genalign.metrics.intervals import Estimate

WIDTH, HEIGHT = 480.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, WIDTH - 14.0, 34.0, HEIGHT - 44.0  # edges of the plot in pixels
_LETTER = 10.0  # pixels of a label, at the largest font size of a page
_MARKS, _RAW = 60, 400  # points of the bold line, which can be read out, and of the faint line behind it


@dataclass(frozen=True)
class Point:
    """One value with its interval, if it has one."""

    x: float
    y: float
    interval: tuple[float, float] | None = None

    @property
    def span(self) -> tuple[float, float]:
        """The interval; without one, the value alone."""
        return self.interval or (self.y, self.y)


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    ``format`` writes a value, and ``unit`` divides it before ticks are placed. Intervals and the margin around values
    end at ``limits``; ``from_zero`` starts the axis at zero, and ``whole`` puts ticks at whole numbers only.
    """

    label: str
    format: Callable[[float], str]
    unit: float = 1.0
    limits: tuple[float, float] = (-math.inf, math.inf)
    from_zero: bool = False
    whole: bool = False

    def within(self, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        """Cut an interval, if there is one, to the limits."""
        return interval and (max(interval[0], self.limits[0]), min(interval[1], self.limits[1]))


@dataclass(frozen=True)
class _Scale:
    """A linear map from [low, high] to the pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 1)


def interval_of(estimate: Estimate) -> tuple[float, float] | None:
    """The interval of an estimate as a point has it."""
    return (estimate.low, estimate.high) if estimate.has_interval else None


def line_chart(points: Sequence[Point], x_axis: Axis, y_axis: Axis, title: str) -> Markup:
    """Draw points, at least one, as a line over its band; many become means of neighbors over a faint line."""
    x, y = _scales(points, y_axis)
    marks = binned(points, _MARKS)
    parts = [_grid(x, y, x_axis, y_axis)]
    if marks[0].interval:
        outline = [(p.x, p.span[1]) for p in marks] + [(p.x, p.span[0]) for p in reversed(marks)]
        parts.append(f'<polygon class="band" points="{_pixels(outline, x, y)}"/>')
    if len(points) > _MARKS:
        parts.append(f'<polyline class="raw" points="{_pixels([(p.x, p.y) for p in binned(points, _RAW)], x, y)}"/>')
    parts.append(f'<polyline class="line" points="{_pixels([(p.x, p.y) for p in marks], x, y)}"/>')

    # A column for each mark, which shows its value in the upper right corner while the mouse is over it
    edges = [x.start, *((x(a.x) + x(b.x)) / 2 for a, b in pairwise(marks)), _RIGHT]
    dots = marks if len(marks) <= 20 else marks[-1:]
    parts += [f'<circle class="dot" cx="{x(p.x):g}" cy="{y(p.y):g}" r="3"/>' for p in dots]
    for p, (left, right) in zip(marks, pairwise(edges), strict=True):
        interval = f" ({' to '.join(map(y_axis.format, p.interval))})" if p.interval else ""
        text = f"{y_axis.format(p.y)}{interval} at {x_axis.format(p.x / x_axis.unit)} {x_axis.label}"
        parts.append(
            f'<g class="hit"><rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{_BOTTOM - _TOP}"/>'
            f'<circle cx="{x(p.x):g}" cy="{y(p.y):g}" r="4"/>'
            f'<text x="{_RIGHT}" y="14">{escape(text)}</text></g>'
        )
    return svg(WIDTH, HEIGHT, "chart", f"{title} against {x_axis.label}", "".join(parts))


def lines_chart(series: Mapping[str, Sequence[Point]], x_axis: Axis, y_axis: Axis, title: str) -> Markup:
    """Draw several lines of at least one point each, in the colors of ``line_color``, in one frame.

    The last point of a line shows its interval, if it has one.
    """
    x, y = _scales([point for points in series.values() for point in points], y_axis)
    parts = [_grid(x, y, x_axis, y_axis)]
    for place, points in enumerate(series.values()):
        color, marks = line_color(place), [(p.x, p.y) for p in binned(points, _MARKS)]
        parts.append(f'<polyline class="line" style="stroke:{color}" points="{_pixels(marks, x, y)}"/>')
        if points[-1].interval:
            at, (low, high) = x(points[-1].x), points[-1].span
            parts.append(f'<line style="stroke:{color}" x1="{at:g}" x2="{at:g}" y1="{y(low):g}" y2="{y(high):g}"/>')
        end = f'cx="{x(marks[-1][0]):g}" cy="{y(marks[-1][1]):g}" r="3"'
        parts.append(f'<circle class="dot" style="fill:{color}" {end}/>')
    return svg(WIDTH, HEIGHT, "chart", f"{title} against {x_axis.label}", "".join(parts))


def crosses_chart(
    points: Sequence[Point], across: Sequence[tuple[float, float] | None], x_axis: Axis, y_axis: Axis
) -> Markup:
    """Draw points in their order as a line, each with its interval along both axes; ``across`` are those along x."""
    spans = [span or (point.x, point.x) for point, span in zip(points, across, strict=True)]
    ends = [Point(end, point.y, point.interval) for point, span in zip(points, spans, strict=True) for end in span]
    x, y = _scales(ends, y_axis)
    parts = [_grid(x, y, x_axis, y_axis)]
    parts.append(f'<polyline class="line" points="{_pixels([(p.x, p.y) for p in points], x, y)}"/>')
    for point, (left, right) in zip(points, spans, strict=True):
        (low, high), at, up = point.span, x(point.x), y(point.y)
        parts.append(f'<line class="reach" x1="{x(left):g}" x2="{x(right):g}" y1="{up:g}" y2="{up:g}"/>')
        parts.append(f'<line class="reach" x1="{at:g}" x2="{at:g}" y1="{y(low):g}" y2="{y(high):g}"/>')
        parts.append(f'<circle class="dot" cx="{at:g}" cy="{up:g}" r="3"/>')
    return svg(WIDTH, HEIGHT, "chart", f"{y_axis.label} against {x_axis.label}", "".join(parts))


def line_color(place: int) -> str:
    """A color for the line at a place among several, on light and dark pages."""
    return f"hsl({(210 + 137 * place) % 360} 65% 52%)"


def whisker(estimate: Estimate, limits: tuple[float, float], label: str) -> Markup:
    """Draw one interval on a line between ``limits``, with zero marked."""
    x = _Scale(min(limits[0], 0.0), max(limits[1], 0.0, limits[0] + 1e-9), 6, 154)
    sign, zero = gain_mood(estimate), x(0)
    if not estimate.has_interval:
        estimate = Estimate(estimate.mean, *limits, estimate.n)
    body = (
        f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="20"/>'
        f'<line class="reach {sign}" x1="{x(estimate.low)}" x2="{x(estimate.high)}" y1="10" y2="10"/>'
        f'<circle class="mean {sign}" cx="{x(estimate.mean)}" cy="10" r="4.5"/>'
    )
    return svg(160, 20, "whisker", label, body)


def binned(points: Sequence[Point], limit: int) -> list[Point]:
    """Average neighbors to at most ``limit`` points; intervals are dropped where points are averaged."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(math.fsum(p.x for p in c) / len(c), math.fsum(p.y for p in c) / len(c)) for c in chunks]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in [low, high] that are 1, 2 or 5 times a power of ten apart; about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def _scales(points: Sequence[Point], y_axis: Axis) -> tuple[_Scale, _Scale]:
    """Scales for all values and intervals with a small margin, within the limits of the axis, beside its labels."""
    first, last = min(p.x for p in points), max(p.x for p in points)
    low, high = min(p.span[0] for p in points), max(p.span[1] for p in points)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = min(low, 0.0) if y_axis.from_zero else min(low, max(low - margin, y_axis.limits[0]))
    top = max(high, min(high + margin, y_axis.limits[1]))
    y = _Scale(bottom, top, _BOTTOM, _TOP)
    left = max(_LEFT, *(_LETTER * len(text) + 8 for _, text in _tick_labels(y, y_axis, 5)))
    return _Scale(first, last if last > first else first + 1, left, _RIGHT), y


def _grid(x: _Scale, y: _Scale, x_axis: Axis, y_axis: Axis) -> str:
    """Both axes with their labels; ticks that would read alike get more digits."""
    parts = [
        f'<text class="axis" x="0" y="14">{escape(y_axis.label)}</text>',
        f'<text class="axis end" x="{_RIGHT}" y="{HEIGHT - 4}">{escape(x_axis.label)}</text>',
        f'<line class="base" x1="{x.start}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>',
    ]
    for value, text in _tick_labels(y, y_axis, 5):
        at = y(value)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{_RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick end" x="{x.start - 8}" y="{at + 4:.1f}">{escape(text)}</text>')
    for value, text in _tick_labels(x, x_axis, 7):
        parts.append(f'<text class="tick mid" x="{x(value)}" y="{_BOTTOM + 18}">{escape(text)}</text>')
    return "".join(parts)


def _tick_labels(scale: _Scale, axis: Axis, number: int) -> list[tuple[float, str]]:
    values = ticks(scale.low / axis.unit, scale.high / axis.unit, number)
    values = [value for value in values if value.is_integer() or not axis.whole]
    labels = [axis.format(value) for value in values]
    if len(set(labels)) < len(labels):
        labels = [f"{value:.6g}" for value in values]
    return [(value * axis.unit, label) for value, label in zip(values, labels, strict=True)]


def _pixels(points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(a):g},{y(b):g}" for a, b in points)


def svg(width: float, height: float, kind: str, label: str, body: str) -> Markup:
    """Wrap a figure's body, in which every text is escaped already."""
    head = f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{head}{body}</svg>")
