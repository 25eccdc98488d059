"""The headline, the tables, the pairs of samples and the facts of a run, in words, for the page to lay out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genalign.evaluation.evaluate import Evaluation
from genalign.evaluation.paired import Pair
from genalign.evaluation.report.curves import whisker
from genalign.evaluation.report.reading import Comparison, Run
from genalign.evaluation.report.samples import fitting, thumbnail
from genalign.evaluation.report.words import SHARES, count, duration, interval, mood, plain, scored, signed, size
from genalign.metrics.intervals import Estimate
from genalign.runtime.media import Thumbnail

PAIRS_SHOWN = 12
_OVERALL = "mean over tasks"
_VERDICTS = {"up": "a clear improvement", "down": "a clear regression", "even": "no clear change"}


@dataclass(frozen=True)
class Headline:
    """What the run came to; ``before`` and ``after`` are empty where there is no number yet."""

    title: str
    before: str
    after: str
    verdict: str
    detail: str
    mood: str


@dataclass(frozen=True)
class Cell:
    """A value, and its interval below it."""

    value: str
    interval: str


@dataclass(frozen=True)
class TableRow:
    """A task; a cell is None where it was not measured."""

    task: str
    images: int
    before: Cell | None
    after: Cell | None
    gain: Cell | None
    mood: str
    whisker: Markup


@dataclass(frozen=True)
class Table:
    score: str
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class Change:
    """One score of a pair."""

    score: str
    before: str
    after: str
    mood: str


@dataclass(frozen=True)
class Card:
    """A pair of samples."""

    prompt: str
    task: str
    before: Thumbnail
    after: Thumbnail
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Fact:
    label: str
    value: str


def headline(run: Run) -> Headline:
    """The main score before and after with the verdict on its gain, or the best there is of an unfinished run."""
    if run.before and run.after:
        return _finished(run.before, run.after, run.comparison)
    watched = [row for row in run.rows if row.get("held_out")]
    if watched:
        score = next(iter(watched[0]["held_out"]))
        return _unfinished(score, [(row["round"], Estimate(**row["held_out"][score])) for row in watched])
    verdict = f"{len(run.rows)} rounds recorded" if run.rows else "nothing recorded yet"
    return Headline("A run without a held-out score", "", "", verdict, "", "even")


def _finished(before: Evaluation, after: Evaluation, comparison: Comparison | None) -> Headline:
    score = _main_score(before)
    verdict, detail, feeling = "not comparable", "The two were not made in the same way.", "even"
    if comparison:
        gain, points = comparison.gain[score], " points" if score in SHARES else ""
        feeling = mood(gain.low, gain.high)
        verdict = f"{signed(score, gain.mean)}{points}: {_VERDICTS[feeling]}"
        detail = (
            f"95 % interval of the gain {interval(score, gain, signed)}{points}, "
            f"from {gain.n} pairs that share prompt and initial noise."
        )
    title = f"{plain(score).capitalize()} score on {before.protocol.suite}"
    old, new = before.overall[score].mean, after.overall[score].mean
    return Headline(title, scored(score, old), scored(score, new), verdict, detail, feeling)


def _unfinished(score: str, held_out: Sequence[tuple[int, Estimate]]) -> Headline:
    (first, old), (last, new) = held_out[0], held_out[-1]
    return Headline(
        f"Held-out {plain(score)} score so far",
        scored(score, old.mean),
        scored(score, new.mean),
        f"from round {first} to round {last}; the run is not finished",
        f"95 % interval of the last value {interval(score, new, scored)}, from {new.n} images. "
        "Without a final evaluation the gain is not established.",
        "even",
    )


def _main_score(evaluation: Evaluation) -> str:
    return "strict" if "strict" in evaluation.score_names else evaluation.score_names[0]


def tables(run: Run) -> list[Table]:
    """One table for each score, the main one first; the last row of each is the mean over tasks."""
    measured = run.before or run.after
    if measured is None:
        return []
    names = sorted(measured.score_names, key=lambda name: name != _main_score(measured))
    return [Table(name, _table_rows(run, measured, name)) for name in names]


def _table_rows(run: Run, measured: Evaluation, score: str) -> tuple[TableRow, ...]:
    before = _column(run.before.tasks, run.before.overall, score) if run.before else {}
    after = _column(run.after.tasks, run.after.overall, score) if run.after else {}
    gains = _column(run.comparison.tasks, run.comparison.gain, score) if run.comparison else {}
    lows, highs = [gain.low for gain in gains.values()], [gain.high for gain in gains.values()]
    limits = min(lows, default=0.0), max(highs, default=0.0)
    return tuple(
        _table_row(task, score, (before.get(task), after.get(task), gains.get(task)), limits)
        for task in (*measured.tasks, _OVERALL)
    )


def _column(
    tasks: Mapping[str, Mapping[str, Estimate]], overall: Mapping[str, Estimate], score: str
) -> dict[str, Estimate]:
    """The estimates of one score by task, with the mean over tasks last."""
    return {task: scores[score] for task, scores in {**tasks, _OVERALL: overall}.items() if score in scores}


def _table_row(
    task: str,
    score: str,
    measured: tuple[Estimate | None, Estimate | None, Estimate | None],
    limits: tuple[float, float],
) -> TableRow:
    before, after, gain = measured
    images = next((estimate.n for estimate in measured if estimate), 0)
    drawn = whisker(gain, limits, f"gain {signed(score, gain.mean)}") if gain else Markup()
    feeling = mood(gain.low, gain.high) if gain else "even"
    cells = _cell(score, before, scored), _cell(score, after, scored), _cell(score, gain, signed)
    return TableRow(plain(task), images, *cells, feeling, drawn)


def _cell(score: str, estimate: Estimate | None, write: Callable[[str, float], str]) -> Cell | None:
    return Cell(write(score, estimate.mean), interval(score, estimate, write)) if estimate else None


def regressions(run: Run) -> list[Card]:
    """The pairs that lost most, as many as the page has room for."""
    return losses(run.comparison.pairs if run.comparison else (), run.folder / "before", run.folder / "after")


def improvements(run: Run) -> list[Card]:
    """The pairs that gained most, as many as the page has room for."""
    return wins(run.comparison.pairs if run.comparison else (), run.folder / "before", run.folder / "after")


def losses(ranked: Sequence[Pair], before: Path, after: Path) -> list[Card]:
    """The first of pairs that are ranked worst regression first, with their samples in two evaluations' folders."""
    return _cards([pair for pair in ranked[:PAIRS_SHOWN] if _order(pair) < 0], before, after)


def wins(ranked: Sequence[Pair], before: Path, after: Path) -> list[Card]:
    """The last of them, best first."""
    return _cards([pair for pair in ranked[: -PAIRS_SHOWN - 1 : -1] if _order(pair) > 0], before, after)


def _order(pair: Pair) -> float:
    """The first difference that is not zero, which is what pairs are ranked by."""
    return next((difference for name in _names(pair) if (difference := pair.difference(name))), 0.0)


def _names(pair: Pair) -> list[str]:
    return [name for name in pair.before.scores if name in pair.after.scores]


def _cards(pairs: Sequence[Pair], before: Path, after: Path) -> list[Card]:
    """As many cards as the page has room for."""
    cards = (
        Card(
            pair.before.prompt,
            plain(pair.before.task),
            thumbnail(before, pair.before.image),
            thumbnail(after, pair.after.image),
            _changes(pair),
        )
        for pair in pairs
    )
    return fitting(cards, lambda card: (card.before, card.after))


def _changes(pair: Pair) -> tuple[Change, ...]:
    return tuple(
        Change(
            plain(name),
            f"{pair.before.scores[name]:.3g}",
            f"{pair.after.scores[name]:.3g}",
            mood(pair.difference(name), pair.difference(name)),
        )
        for name in _names(pair)
    )


def cost(run: Run) -> list[Fact]:
    """What the training used, from the last round."""
    if not run.rows:
        return []
    last = run.rows[-1]
    machine = last["machine"]
    return [
        Fact("rounds", count(len(run.rows))),
        Fact("training samples", count(last["samples"])),
        Fact("NFE", count(last["nfe"])),
        Fact("training time", duration(machine["seconds"])),
        Fact("peak memory", size(machine["peak_memory_bytes"])),
        Fact("failed rewards", count(sum(row["failed_rewards"] for row in run.rows))),
        Fact("updates left out", count(sum(row.get("skipped_updates", 0) for row in run.rows))),
    ]


def protocol(run: Run) -> list[Fact]:
    """How the numbers were made."""
    measured = run.before or run.after
    if measured is None:
        return []
    return [Fact("protocol hash", measured.protocol.hash), *flattened(measured.protocol.as_dict())]


def flattened(value: Any, name: str = "") -> list[Fact]:
    """JSON as lines: nested keys joined by dots, lists written out."""
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return [fact for key, inner in value.items() for fact in flattened(inner, f"{prefix}{key}")]
    if value is None and not name:
        return []
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [Fact(name, text)]
