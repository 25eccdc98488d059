"""Small SVG figures as text: line charts with a band and a read-out, and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from genalign.metrics.intervals import Estimate

WIDTH, HEIGHT = 480.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 26.0, 44.0
_MARKS, _RAW = 60, 600  # points that can be read out; points of the faint line behind them


@dataclass(frozen=True)
class Point:
    """One value, with its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """``format`` writes a value; ``unit`` divides it before round ticks are chosen; ``limits`` hold the view, where
    given, and ``from_zero`` begins it at zero.
    """

    label: str
    format: Callable[[float], str]
    unit: float = 1.0
    limits: tuple[float, float] = (-math.inf, math.inf)
    from_zero: bool = False


@dataclass(frozen=True)
class _Scale:
    """A linear map from [low, high] to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 1)


def line_chart(points: Sequence[Point], x_axis: Axis, y_axis: Axis, title: str) -> Markup:
    """An SVG of one line over its band. Many points become means of neighbours over a faint line of all.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError(f"the chart {title!r} has no points: leave it out")
    x = _x_scale(points)
    y = _y_scale(points, y_axis)
    marks = binned(points, _MARKS)
    parts = [_y_grid(y, y_axis), _x_grid(x, x_axis), _band(marks, x, y)]
    if len(points) > _MARKS:
        parts.append(_line(binned(points, _RAW), x, y, "raw"))
    parts += [_line(marks, x, y, "line"), _dots(marks, x, y), _readouts(marks, x, y, x_axis, y_axis)]
    label = f"{title} against {x_axis.label}"
    return _svg(WIDTH, HEIGHT, "chart", label, "".join(parts))


def whisker(estimate: Estimate, limits: tuple[float, float], label: str) -> Markup:
    """An SVG of one interval on a line between ``limits``, with zero marked."""
    x = _Scale(min(limits[0], 0.0), max(limits[1], 0.0, limits[0] + 1e-9), 6, 154)
    sign = "up" if estimate.low > 0 else "down" if estimate.high < 0 else "even"
    low, mean, high, zero = x(estimate.low), x(estimate.mean), x(estimate.high), x(0)
    body = (
        f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="20"/>'
        f'<line class="reach {sign}" x1="{low}" x2="{high}" y1="10" y2="10"/>'
        f'<circle class="mean {sign}" cx="{mean}" cy="10" r="4.5"/>'
    )
    return _svg(160, 20, "whisker", label, body)


def binned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most ``limit`` points, each the mean of as many neighbours; bands are kept only where nothing is merged."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(_mean([p.x for p in chunk]), _mean([p.y for p in chunk])) for chunk in chunks]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that lie in [low, high]; about ``count`` of them."""
    if not low < high:
        raise ValueError(f"ticks need a range, got {low} to {high}")
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _x_scale(points: Sequence[Point]) -> _Scale:
    low, high = min(p.x for p in points), max(p.x for p in points)
    return _Scale(low, high if high > low else low + 1, _LEFT, WIDTH - _RIGHT)


def _y_scale(points: Sequence[Point], axis: Axis) -> _Scale:
    """The values' range and a little more, within the axis' limits."""
    low = min(p.y if p.low is None else min(p.low, p.y) for p in points)
    high = max(p.y if p.high is None else max(p.high, p.y) for p in points)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = max(low - margin, axis.limits[0]), min(high + margin, axis.limits[1])
    low = 0.0 if axis.from_zero else low
    return _Scale(low, high, HEIGHT - _BOTTOM, _TOP)


def _y_grid(y: _Scale, axis: Axis) -> str:
    lines = []
    for tick in ticks(y.low, y.high, 5):
        at = y(tick)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        lines.append(f'<text class="tick end" x="{_LEFT - 8}" y="{at + 4:.1f}">{escape(axis.format(tick))}</text>')
    lines.append(f'<text class="axis" x="0" y="14">{escape(axis.label)}</text>')
    return "".join(lines)


def _x_grid(x: _Scale, axis: Axis) -> str:
    base = HEIGHT - _BOTTOM
    lines = [f'<line class="base" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>']
    for tick in ticks(x.low / axis.unit, x.high / axis.unit, 7):
        at = x(tick * axis.unit)
        lines.append(f'<text class="tick mid" x="{at}" y="{base + 18}">{escape(axis.format(tick))}</text>')
    lines.append(f'<text class="axis end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}">{escape(axis.label)}</text>')
    return "".join(lines)


def _band(points: Sequence[Point], x: _Scale, y: _Scale) -> str:
    above = [(x(p.x), y(p.high)) for p in points if p.high is not None]
    below = [(x(p.x), y(p.low)) for p in points if p.low is not None]
    if len(above) < 2:
        return ""
    return f'<polygon class="band" points="{_coordinates(above + below[::-1])}"/>'


def _line(points: Sequence[Point], x: _Scale, y: _Scale, kind: str) -> str:
    return f'<polyline class="{kind}" points="{_coordinates([(x(p.x), y(p.y)) for p in points])}"/>'


def _coordinates(pixels: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in pixels)


def _dots(points: Sequence[Point], x: _Scale, y: _Scale) -> str:
    """Points that are few enough to be seen as such."""
    shown = points if len(points) <= 20 else points[-1:]
    return "".join(f'<circle class="dot" cx="{x(p.x):g}" cy="{y(p.y):g}" r="3"/>' for p in shown)


def _readouts(points: Sequence[Point], x: _Scale, y: _Scale, x_axis: Axis, y_axis: Axis) -> str:
    """For each point a column that, under the mouse, shows its values in the upper right corner."""
    centres = [x(p.x) for p in points]
    edges = [_LEFT, *((a + b) / 2 for a, b in pairwise(centres)), WIDTH - _RIGHT]
    columns = zip(points, edges[:-1], edges[1:], strict=True)
    return "".join(_readout(p, left, right, x, y, _words(p, x_axis, y_axis)) for p, left, right in columns)


def _readout(point: Point, left: float, right: float, x: _Scale, y: _Scale, words: str) -> str:
    at, base = x(point.x), HEIGHT - _BOTTOM
    return (
        f'<g class="hit"><title>{escape(words)}</title>'
        f'<rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{base - _TOP}"/>'
        f'<line x1="{at}" x2="{at}" y1="{_TOP}" y2="{base}"/><circle cx="{at}" cy="{y(point.y)}" r="4"/>'
        f'<text x="{WIDTH - _RIGHT}" y="14">{escape(words)}</text></g>'
    )


def _words(point: Point, x_axis: Axis, y_axis: Axis) -> str:
    interval = ""
    if point.low is not None and point.high is not None:
        interval = f" ({y_axis.format(point.low)} to {y_axis.format(point.high)})"
    return f"{y_axis.format(point.y)}{interval} at {x_axis.format(point.x / x_axis.unit)} {x_axis.label}"


def _svg(width: float, height: float, kind: str, label: str, body: str) -> Markup:
    """A figure; every text in ``body`` is escaped already."""
    head = f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{head}{body}</svg>")
