"""The page about several recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from genalign.evaluation.compare_runs import RecipeSummary
from genalign.evaluation.report.curves import whisker
from genalign.evaluation.report.html import page
from genalign.evaluation.report.words import count, duration, interval, mood, plain, signed
from genalign.metrics.intervals import Estimate
from genalign.runtime.files import write_text


@dataclass(frozen=True)
class _Line:
    """One recipe as the page lays it out."""

    name: str
    seeds: int
    gain: str
    interval: str
    mood: str
    whisker: Markup
    cells: tuple[str, ...]


def write_comparison(path: Path, standings: Sequence[RecipeSummary]) -> None:
    """One offline HTML page, best recipe first."""
    ordered = sorted(standings, key=lambda found: -found.gain)
    main = next(iter(ordered[0].scores))
    limits = min(found.low for found in ordered), max(found.high for found in ordered)
    lines = [_line(found, main, limits) for found in ordered]
    text = page("comparison.html.j2").render(
        name=path.resolve().parent.name, score=main, recipes=lines, columns=_columns(ordered[0])
    )
    write_text(path, text)


def _line(found: RecipeSummary, main: str, limits: tuple[float, float]) -> _Line:
    estimate = Estimate(found.gain, found.low, found.high, found.seeds)
    values = [signed(score, value) for score, value in found.scores.items() if score != main]
    values += [signed(main, value) for value in found.tasks.values()]
    values += [f"{found.kl:.2g}", *map(_difference, found.diversity.values())]
    values += [duration(60 * found.minutes), count(found.nfe)]
    gain, feeling = signed(main, found.gain), mood(found.low, found.high)
    drawn = whisker(estimate, limits, f"gain {gain}")
    return _Line(found.name, found.seeds, gain, interval(main, estimate, signed), feeling, drawn, tuple(values))


def _difference(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "not seen"


def _columns(found: RecipeSummary) -> list[str]:
    """Headings, in the order of a line's cells."""
    scores = [plain(score) for score in list(found.scores)[1:]]
    diversity = [f"diversity: {plain(name)}" for name in found.diversity]
    return [*scores, *(plain(task) for task in found.tasks), "KL", *diversity, "time", "NFE"]
