"""The page about the training of a reward: what it was trained on, and what it says of held-out judgments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genalign.evaluation.report.curves import Axis, Point, interval_of, line_chart
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.reading import Row, read_object, read_rows
from genalign.evaluation.report.reward_page import SHARE, MeasureRow, RewardChart, measure_rows, reliability_chart
from genalign.evaluation.report.samples import Drawing, drawing, fitting
from genalign.evaluation.report.sections import flattened
from genalign.evaluation.report.words import count, number, percent, plain, titled
from genalign.metrics.intervals import Estimate
from genalign.reward_learning.judged_pairs import TRAINING_ITEMS
from genalign.reward_learning.pair_measures import CalibrationBin
from genalign.reward_learning.preference_formats import path_names
from genalign.reward_learning.reward_file import REWARD
from genalign.reward_learning.reward_report import RewardMeasure

_ANNOTATORS = 20  # named on a page
_CHANGES = {"drop": "dropped", "flip": "flipped", "soften": "softened"}
_EPOCHS = Axis("epochs", count, whole=True)


@dataclass(frozen=True)
class RewardRun:
    """The folder of a reward's training, finished or not; a part that is absent is empty.

    Attributes:
        rows: The lines of metrics.jsonl.
        config: The settings.
        data: How many judgments were read and used (data.json).
        changed: The training pairs that an ensemble's vote changed.
        card: The model card.
        finished: Whether the reward is saved.
    """

    rows: tuple[Row, ...]
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    changed: tuple[Row, ...]
    card: str
    finished: bool

    @classmethod
    def read(cls, folder: Path) -> RewardRun:
        """Read the folder of a reward's training, finished or not."""
        card = folder / "card.md"
        return cls(
            read_rows(folder / "metrics.jsonl"),
            read_object(folder / "config.json"),
            read_object(folder / "data.json"),
            read_rows(folder / "changed_pairs.jsonl"),
            card.read_text(encoding="utf-8") if card.is_file() else "",
            (folder / REWARD).is_file(),
        )

    @property
    def fit(self) -> Mapping[str, Any]:
        """How long and how the reward is trained, as its configuration has it."""
        return self.config.get("fit") or {}

    @property
    def saved(self) -> Row:
        """The row of the weights that are saved: with patience, of the lowest held-out loss, else the last."""
        losses = {place: loss for place, row in enumerate(self.rows) if (loss := _held_out(row, "loss")) is not None}
        if self.fit.get("patience") is None or not losses:
            return self.rows[-1] if self.rows else {}
        return self.rows[min(losses, key=lambda place: losses[place])]

    @property
    def held_out(self) -> Mapping[str, Any]:
        """The held-out measures of the weights that are saved."""
        return self.saved.get("held_out") or {}

    @property
    def epochs(self) -> str:
        """How many of the epochs are trained."""
        return f"{count(self.rows[-1]['epoch'] if self.rows else 0)} of {self.fit.get('epochs', 'unknown')}"


@dataclass(frozen=True)
class ChangedPair:
    """A training pair that was changed: both samples with their captions, the prompt, and what was voted."""

    prompt: str
    samples: tuple[tuple[str, Drawing], ...]
    votes: str


def is_reward_training(folder: Path) -> bool:
    """Whether ``folder`` is of ``genalign reward train``."""
    return (folder / TRAINING_ITEMS).is_file()


def write_reward_training(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a reward's training, finished or not, and return its path."""
    run = RewardRun.read(folder)
    accuracies = _estimates(run.held_out.get("accuracy", {})).items()
    measures = [RewardMeasure("accuracy", plain(name), own, is_share=True) for name, own in accuracies]
    cards = (_changed_pair(folder, line) for line in sorted(run.changed, key=lambda one: float(one["mean"])))
    pictured = (card for card in cards if any(item for _, (item, _) in card.samples))
    return write_page(
        folder / "report.html",
        "reward_training.html.j2",
        title=f"A reward learned from {path_names(run.config.get('preferences', 'judgments'))}",
        subject=_subject(run.config),
        unfinished="" if run.finished else f"{run.epochs} epochs",
        facts=_facts(run),
        notes=_notes(run, folder),
        charts=_charts(run),
        accuracy=measure_rows(measures),
        members=_members(run.held_out),
        nuisances=_nuisances(run),
        counts=_counts(run.data),
        annotators=_annotators(run.data),
        votes=_votes(run),
        changed=fitting(pictured, lambda card: [item for _, (item, _) in card.samples]),
        optimization=_optimization(run.rows),
        card=run.card,
        details=flattened(run.config),
    )


def _subject(config: Mapping[str, Any]) -> str:
    """Name the parts of the training that its configuration names."""
    parts = ("encoder", "head", "loss", "label_noise", "votes", "disentangle", "uncertainty")
    return " · ".join(
        f"{plain(name)} {part['class_path'].rpartition('.')[2]}" if "class_path" in part else plain(name)
        for name in parts
        if isinstance(part := config.get(name), Mapping)
    )


def _held_out(row: Row, name: str) -> float | None:
    """Read a finite number of the held-out measures of a row; None without one."""
    value = (row.get("held_out") or {}).get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def _estimates(accuracy: Mapping[str, Any]) -> dict[str, Estimate]:
    """Read the accuracies of the dimensions that were measured."""
    return {name: Estimate.from_dict(own) for name, own in accuracy.items() if own}


def _facts(run: RewardRun) -> dict[str, str]:
    """The most important numbers of the weights that are saved."""
    facts = dict[str, str]()
    accuracies = _estimates(run.held_out.get("accuracy", {}))
    for name, own in accuracies.items():
        label = "held-out accuracy" if len(accuracies) == 1 else f"held-out accuracy, {plain(name)}"
        facts[label] = percent(own.mean)
    if (error := _held_out(run.saved, "calibration")) is not None:
        facts["calibration error"] = percent(error)
    if (loss := _held_out(run.saved, "loss")) is not None:
        facts["held-out loss"] = number(loss)
    if run.rows:
        facts["epochs"] = run.epochs
    facts["members"] = str(run.fit.get("members", 1))
    if training := run.data.get("training"):
        facts["training judgments"] = count(sum(training["kinds"].values()))
    return facts


def _notes(run: RewardRun, folder: Path) -> list[str]:
    """Say in sentences what is not finished, which weights are saved, and what could not be measured."""
    patience, epoch = run.fit.get("patience"), count(run.saved.get("epoch", 0))
    unmeasured = [name for name, own in run.held_out.get("accuracy", {}).items() if not own]
    waited = f"{patience} evaluation{'' if patience == 1 else 's'}"
    early = bool(run.rows) and run.rows[-1]["epoch"] < run.fit.get("epochs", 0)
    sentences = {
        f"The training is not finished: {run.epochs} epochs are recorded. It was interrupted, or is still running. "
        f"Continue an interrupted one with: genalign reward train --config {folder / 'config.json'}": not run.finished,
        "No epoch is recorded yet.": not run.rows,
        f"Training stopped early: the held-out loss was not lower in {waited}.": run.finished and early,
        f"The numbers are of the weights after epoch {epoch}, whose held-out loss is the lowest"
        f"{' and which are saved' if run.finished else ' so far'}.": run.held_out and patience is not None,
        "Nothing was held out: accuracy and calibration are not measured.": run.rows and not run.held_out,
        f"The accuracy of {', '.join(unmeasured)} is not measured: no held-out judgment decides it.": unmeasured,
        "The held-out loss is not finite: lower fit.optimizer.learning_rate.": run.held_out
        and _held_out(run.saved, "loss") is None,
    }
    return [sentence for sentence, applies in sentences.items() if applies]


def _charts(run: RewardRun) -> list[RewardChart]:
    """Draw the losses, the accuracy of each dimension and the calibration over epochs, and the calibration by bins."""
    trained = [Point(row["epoch"], row["loss"]) for row in run.rows if row["loss"] is not None]
    losses = {"training": trained, "held-out": _curve(run.rows, "loss")}
    charts = list[RewardChart]()
    if any(losses.values()):
        caption = "in training with the correction of label noise and all terms, held-out without"
        charts.append(RewardChart.of_lines("Loss", caption, losses, _EPOCHS, Axis("", number)))
    for name in run.held_out.get("accuracy", {}):
        measured = [(row["epoch"], _estimates((row.get("held_out") or {}).get("accuracy", {}))) for row in run.rows]
        points = [Point(epoch, own[name].mean, interval_of(own[name])) for epoch, own in measured if name in own]
        if points:
            title = f"Held-out accuracy, {plain(name)}"
            caption = "share of pairs in the right order, over prompts, with its 95 % interval"
            charts.append(RewardChart(title, caption, line_chart(points, _EPOCHS, SHARE, title)))
    if errors := _curve(run.rows, "calibration"):
        title, axis = "Calibration error", Axis("", percent, limits=(0.0, 1.0), from_zero=True)
        caption = "mean distance of confidence and accuracy on held-out judgments"
        charts.append(RewardChart(title, caption, line_chart(errors, _EPOCHS, axis, title)))
    bins = [CalibrationBin.from_dict(one) for one in run.held_out.get("bins", [])]
    return [*charts, reliability_chart(bins)] if len(bins) > 1 else charts


def _curve(rows: Sequence[Row], name: str) -> list[Point]:
    values = ((row["epoch"], _held_out(row, name)) for row in rows)
    return [Point(epoch, value) for epoch, value in values if value is not None]


def _members(held_out: Mapping[str, Any]) -> list[MeasureRow]:
    """The accuracy of each member of an ensemble, by dimension."""
    dimensions = held_out.get("members", {})
    measures = [
        RewardMeasure("members", f"member {place}{f', {plain(name)}' if len(dimensions) > 1 else ''}", own, True)
        for name, accuracies in dimensions.items()
        for place, own in enumerate((one and Estimate.from_dict(one) for one in accuracies), start=1)
        if own
    ]
    return measure_rows(measures)


def _nuisances(run: RewardRun) -> list[RewardChart]:
    """Draw over epochs how far the score, and the output that takes a nuisance up, go with the nuisance."""
    measured = [(row["epoch"], (row.get("held_out") or {}).get("nuisances", {})) for row in run.rows]
    labels, axis = {"score": "score", "own": "its own output"}, Axis("correlation", number, limits=(-1.0, 1.0))
    charts = []
    for name, saved in run.held_out.get("nuisances", {}).items():
        series = {
            label: [Point(epoch, own[name][key]) for epoch, own in measured if own and own[name][key] is not None]
            for key, label in labels.items()
        }
        if any(series.values()):
            values = (f"{label} {number(saved[key])}" for key, label in labels.items() if saved[key] is not None)
            caption = f"on held-out samples: {', '.join(values)}"
            charts.append(RewardChart.of_lines(f"Correlation with {plain(name)}", caption, series, _EPOCHS, axis))
    return charts


def _counts(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was read, used and left out, of training and held-out judgments."""
    parts = [data[name] for name in ("training", "held_out") if name in data]
    if len(parts) < 2:
        return []
    rows: list[tuple[str, list[int]]] = [("judgments read", [part["read"] for part in parts])]
    for label, key in (("used, of the kind {}", "kinds"), ("left out, {}", "left_out")):
        names = dict.fromkeys(name for part in parts for name in part[key])
        rows += [(titled(label.format(name)), [part[key].get(name, 0) for part in parts]) for name in names]
    rows += [(name, [part[name] for part in parts]) for name in ("prompts", "samples")]
    named = [sum(bool(name) for name in part["annotators"]) for part in parts]
    rows.append(("annotators who are named", named))
    return [(titled(label), str(trained), str(held_out)) for label, (trained, held_out) in rows]


def _annotators(data: Mapping[str, Any]) -> dict[str, str]:
    """The annotators with the most training judgments."""
    counts = (data.get("training") or {}).get("annotators", {})
    most = sorted(counts.items(), key=lambda one: -one[1])
    named = {name or "not named": str(judged) for name, judged in most[:_ANNOTATORS]}
    rest = most[_ANNOTATORS:]
    return named | ({f"{len(rest)} others": str(sum(judged for _, judged in rest))} if rest else {})


def _votes(run: RewardRun) -> str:
    """Say how many labels an ensemble voted on and how many were changed; empty without a vote."""
    votes = run.data.get("votes")
    if not votes:
        return ""
    settings = run.config.get("votes") or {}
    done = _CHANGES.get(settings.get("change", ""), "changed")
    share = f" ({percent(votes['changed'] / votes['labels'])})" if votes["labels"] else ""
    voters, labels = settings.get("members"), votes["labels"]
    return f"Labels {done} by the vote of {voters} members: {votes['changed']} of {labels}{share}."


def _changed_pair(folder: Path, line: Row) -> ChangedPair:
    """Draw a changed pair, with the sample first that was preferred."""
    files = line.get("files") or [None, None]
    captions = ["preferred", "not preferred"] if line["preferred"] > 0.5 else ["not preferred", "preferred"]
    drawn = [(caption, drawing(folder, file, folder)) for caption, file in zip(captions, files, strict=True)]
    drawn.sort(key=lambda one: one[0] != "preferred")
    votes = f"{plain(line['dimension'])}: lead of the preferred sample {number(line['mean'])}"
    votes += f", deviation {number(line['deviation'])}, {line['voters']} voter{'' if line['voters'] == 1 else 's'}"
    return ChangedPair(line["prompt"], tuple(drawn), f"{votes}; {line['annotator']}" if line["annotator"] else votes)


def _optimization(rows: Sequence[Row]) -> list[RewardChart]:
    """Draw the gradient norm and the learning rate."""
    charts = []
    for name, caption in {
        "gradient_norm": "before clipping, mean since the last evaluation",
        "learning_rate": "",
    }.items():
        points = [Point(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            title = titled(plain(name))
            charts.append(RewardChart(title, caption, line_chart(points, _EPOCHS, Axis("", number), title)))
    return charts
