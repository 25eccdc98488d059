"""Charts of every number in the rows of a run, in sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from genalign.evaluation.report.curves import Axis, Point, line_chart
from genalign.evaluation.report.reading import Row, rounds_done
from genalign.evaluation.report.words import SHARES, call_words, count, memory_size, number, percent, plain
from genalign.training.reward_hacking import HackingReport
from genalign.training.round_log import flat_numbers

_CHARTS = {
    "held_out": ("Scores", "Held-out {}", "mean over the held-out prompts, with its 95 % interval"),
    "reward": ("Scores", "Training reward", "weighted mean of all rewards in each round"),
    "rewards": ("Scores", "Reward {}", "mean of each round, unweighted"),
    "kl": ("Policy", "KL to the reference", "how far the policy has moved"),
    "clip_fraction": ("Policy", "Clip fraction", "updates cut off by the clip range"),
    "zero_std_share": ("Policy", "Groups without signal", "all samples of a prompt scored the same"),
    "reward_hacking": ("Reward hacking", "{}", "shift from the untrained model"),
    "loss": ("Optimization", "Loss", "of the policy"),
    "grad_norm": ("Optimization", "Gradient norm", "before clipping"),
    "learning_rate": ("Optimization", "Learning rate", ""),
    "reward_std": ("Optimization", "Spread of the reward", "standard deviation over the samples of a round"),
    "log_ratio_max": ("Optimization", "Largest log-ratio", "of a round's first update; 0 in exact arithmetic"),
    "failed_rewards": ("Optimization", "Failed rewards", "samples of a round that a reward could not score"),
    "skipped_updates": ("Optimization", "Skipped updates", "gradient was not finite"),
    "metrics": ("Method", "{}", "recorded by the method or by a trained reward"),
    "nfe": ("Cost", "NFE", "denoiser evaluations of single samples, from the start"),
    "samples": ("Cost", "Samples", "generated for training, from the start"),
    "calls": ("Cost", "{}", "calls on single samples, from the start"),
    "machine/seconds": ("Cost", "Training time", "seconds, from the start"),
    "machine/samples_per_second": ("Cost", "Samples per second", "mean from the start"),
    "machine/peak_memory_bytes": ("Cost", "Peak memory", "highest so far"),
}
"""Section, title and caption of each number or group of numbers, in the order of the page."""

_OTHER = ("Optimization", "{}", "")  # of numbers that the table does not have

_OPEN = ("Scores", "Policy", "Reward hacking")  # and against time and NFE too; the other sections are folded


@dataclass(frozen=True)
class Chart:
    """One number over a run, against "round" and, if it is important, "time" and "nfe".

    ``status`` is the last status of a reward-hacking signal.
    """

    title: str
    caption: str
    views: Mapping[str, Markup]
    status: str | None = None


@dataclass(frozen=True)
class ChartSection:
    """Charts that belong together; folded ones are opened by a click."""

    title: str
    charts: tuple[Chart, ...]
    folded: bool
    status: str | None = None


def chart_sections(rows: Sequence[Row]) -> list[ChartSection]:
    """Draw every number of the rows; sections without a number are left out."""
    reports = [HackingReport.from_list(row["reward_hacking"]) for row in rows if row.get("reward_hacking")]
    signals = {f"reward_hacking/{signal.name}": signal for signal in reports[-1].signals} if reports else {}
    charts: dict[str, list[Chart]] = {title: [] for title, _, _ in _CHARTS.values()}
    series, order = _series(rows), [*_CHARTS, ""]
    for name in sorted(series, key=lambda name: order.index(_key(name))):
        title, _, _ = _CHARTS.get(_key(name), _OTHER)
        chart = _chart(rows, name, series[name], axes=3 if title in _OPEN else 1)
        if signal := signals.get(name):
            caption = f"shift; {number(signal.before)} before training, {number(signal.now)} now"
            chart = replace(chart, caption=caption, status=signal.status)
        charts[title].append(chart)
    statuses = {"Reward hacking": reports[-1].status} if reports else {}
    return [
        ChartSection(title, tuple(drawn), title not in _OPEN, statuses.get(title))
        for title, drawn in charts.items()
        if drawn
    ]


def _series(rows: Sequence[Row]) -> dict[str, dict[int, Point]]:
    """Every number of the rows by name, as points by the number of their row; an estimate brings its interval."""
    series: dict[str, dict[int, Point]] = {}
    for index, row in enumerate(rows):
        numbers = flat_numbers(row)
        estimates = {name for name in numbers if f"{name}/n" in numbers}
        parts = {f"{name}/{part}" for name in estimates for part in ("low", "high", "n")}
        for name, value in numbers.items():
            if name not in {"round", "calls/nfe"} | parts:  # calls/nfe is the row's nfe
                low, high = numbers.get(f"{name}/low", value), numbers.get(f"{name}/high", value)
                interval = (low, high) if name in estimates and low < high else None  # too few prompts have none
                series.setdefault(name, {})[index] = Point(0.0, value, interval)
    return series


def _chart(rows: Sequence[Row], name: str, points: Mapping[int, Point], axes: int) -> Chart:
    """Draw one number against rounds or, with ``axes`` 3, against rounds, training time and NFE.

    Args:
        rows: All rows of the run.
        name: The name of the number, as in "rewards/ocr".
        points: Its values by the index of their row.
        axes: The number of horizontal axes.
    """
    group, _, rest = name.partition("/")
    _, title, caption = _CHARTS.get(_key(name), _OTHER)
    title = title.format(call_words(rest) if group == "calls" else plain(rest or name))
    views, y_axis = {}, _y_axis(name)
    for key, x_axis, at in _x_axes(rows)[:axes]:
        placed = [Point(at(rows[index]), point.y, y_axis.within(point.interval)) for index, point in points.items()]
        views[key] = line_chart(placed, x_axis, y_axis, title)
    return Chart(title, caption, views)


def _key(name: str) -> str:
    """The key of a number, such as "rewards/ocr", in the table of charts; empty if the table does not have it."""
    return next((key for key in (name, name.partition("/")[0]) if key in _CHARTS), "")


def _y_axis(name: str) -> Axis:
    group, last = name.partition("/")[0], name.rpartition("/")[2]
    if group in ("held_out", "rewards") and last in SHARES:
        return Axis("score", percent, limits=(0.0, 1.0))
    if last.endswith(("_fraction", "_share")):
        return Axis("share", percent, limits=(0.0, 1.0), from_zero=True)
    if last.endswith("_bytes"):
        return Axis("memory", memory_size, from_zero=True)
    if _CHARTS.get(_key(name), _OTHER)[0] == "Cost" or group in ("failed_rewards", "skipped_updates"):
        return Axis("", count, from_zero=True)
    return Axis("shift" if group == "reward_hacking" else "", number, from_zero=name == "kl")


def _x_axes(rows: Sequence[Row]) -> list[tuple[str, Axis, Callable[[Row], float]]]:
    """The horizontal axes: rounds, training time in a unit that suits the length of the run, and NFE."""
    seconds = rows[-1]["machine"]["seconds"]
    units = [(2 * 3600, 3600.0, "hours"), (2 * 60, 60.0, "minutes"), (0, 1.0, "seconds")]
    unit, label = next((unit, label) for least, unit, label in units if seconds >= least)
    return [
        ("round", Axis("rounds", count, whole=True), rounds_done),
        ("time", Axis(label, number, unit), lambda row: float(row["machine"]["seconds"])),
        ("nfe", Axis("NFE", count), lambda row: float(row["nfe"])),
    ]
