"""The training curves of a run, each against rounds, time and NFE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from genalign.evaluation.report.curves import Axis, Point, line_chart
from genalign.evaluation.report.reading import Row
from genalign.evaluation.report.words import SHARES, count, number, percent
from genalign.metrics.intervals import Estimate
from genalign.training.reward_hacking import HackingReport, Signal

_REWARD = Axis("reward", number)
_KL = Axis("KL", number, from_zero=True)
_SHARE = Axis("share", percent, limits=(0.0, 1.0), from_zero=True)


@dataclass(frozen=True)
class View:
    """A chart against one of the horizontal axes, "round", "time" or "nfe"."""

    axis: str
    svg: Markup


@dataclass(frozen=True)
class Chart:
    """``light`` is that of a signal's last reading, "" for none."""

    title: str
    caption: str
    views: tuple[View, ...]
    light: str = ""


@dataclass(frozen=True)
class Watched:
    """What was watched for signs of an exploited reward: the last light, in words, and a chart of every signal."""

    light: str
    words: str
    charts: tuple[Chart, ...]


def charts(rows: Sequence[Row]) -> list[Chart]:
    """The curves that have at least one value."""
    score = next((next(iter(row["held_out"])) for row in rows if row.get("held_out")), "")
    drawn = [
        _chart(
            rows,
            "Held-out score",
            "samples of prompts kept out of training, with 95 % interval",
            Axis(f"{score} score", percent, limits=(0.0, 1.0)) if score in SHARES else Axis(score, number),
            _held_out(score),
        ),
        _chart(rows, "Training reward", "mean of each round", _REWARD, _column("reward")),
        _chart(rows, "KL to the reference", "how far the policy has moved", _KL, _column("kl")),
        _chart(rows, "Clip fraction", "updates cut off by the clip range", _SHARE, _column("clip_fraction")),
        _chart(rows, "Zero-spread groups", "equal rewards, nothing to learn", _SHARE, _column("zero_std_share")),
    ]
    return [chart for chart in drawn if chart.views]


def _chart(rows: Sequence[Row], title: str, caption: str, axis: Axis, read: Callable[[Row], Point | None]) -> Chart:
    """``read`` makes a point of a row, or None where the row has no value; its x is then set for each view."""
    found = [(row, point) for row in rows if (point := read(row)) is not None]
    if not found:
        return Chart(title, caption, ())
    views = []
    for name, horizontal, at in _horizontal_axes(rows):
        points = [Point(at(row), point.y, point.low, point.high) for row, point in found]
        views.append(View(name, line_chart(points, horizontal, axis, title)))
    return Chart(title, caption, tuple(views))


def _horizontal_axes(rows: Sequence[Row]) -> list[tuple[str, Axis, Callable[[Row], float]]]:
    unit, name = _time_unit(rows[-1]["machine"]["seconds"])
    return [
        ("round", Axis("rounds", count), lambda row: float(row["round"])),
        ("time", Axis(name, number, unit), lambda row: float(row["machine"]["seconds"])),
        ("nfe", Axis("NFE", count), lambda row: float(row["nfe"])),
    ]


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds >= 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds >= 2 * 60 else (1.0, "seconds")


def _column(name: str) -> Callable[[Row], Point | None]:
    def read(row: Row) -> Point | None:
        value = row.get(name)
        return None if value is None else Point(0.0, value)

    return read


def _held_out(score: str) -> Callable[[Row], Point | None]:
    def read(row: Row) -> Point | None:
        return _point(Estimate(**row["held_out"][score])) if row.get("held_out") else None

    return read


def _point(estimate: Estimate) -> Point:
    return Point(0.0, estimate.mean, estimate.low, estimate.high)


def watched(rows: Sequence[Row]) -> Watched | None:
    """The panels of a run; None where there are none."""
    panels = [
        (row["round"], HackingReport.from_list(row["reward_hacking"])) for row in rows if row.get("reward_hacking")
    ]
    if not panels:
        return None
    drawn = [_signal(rows, signal) for signal in panels[-1][1].signals]
    return Watched(panels[-1][1].status, _alarms(panels), tuple(drawn))


def _alarms(panels: Sequence[tuple[int, HackingReport]]) -> str:
    alarms = [(number, panel.alarm) for number, panel in panels if panel.alarm]
    if not alarms:
        return "No sign that the reward is exploited."
    number, first = alarms[0]
    seen = f"alarm in {len(alarms)} of {len(panels)} looks, first in round {number}"
    return f"The reward may be exploited: {seen}: {first}"


def _signal(rows: Sequence[Row], last: Signal) -> Chart:
    def read(row: Row) -> Point | None:
        found = [item for item in row.get("reward_hacking") or () if item["name"] == last.name]
        return _point(Estimate(**found[0]["shift"])) if found else None

    caption = f"{number(last.before)} before training, {number(last.now)} now"
    return replace(_chart(rows, last.name, caption, Axis("shift", number), read), light=last.status or "")
