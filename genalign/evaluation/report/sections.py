"""The tables of a paired evaluation, a gallery of pairs of samples that changed, and JSON as lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genalign.evaluation.evaluate import Evaluation
from genalign.evaluation.paired import SamplePair, first_difference, gallery_improvements
from genalign.evaluation.report.curves import whisker
from genalign.evaluation.report.reading import Comparison
from genalign.evaluation.report.samples import Drawing, drawing, fitting
from genalign.evaluation.report.summary import main_score
from genalign.evaluation.report.words import possible, signed
from genalign.metrics.intervals import Estimate

MAX_PAIRS = 12  # on a page, of regressions and of improvements each
OVERALL = "mean over tasks"
PairCard = tuple[SamplePair, Drawing, Drawing]
"""A pair of samples of one prompt and noise, and both drawn."""


@dataclass(frozen=True)
class TableRow:
    """A task before and after; an estimate is None if it was not measured."""

    task: str
    before: Estimate | None
    after: Estimate | None
    gain: Estimate | None
    whisker: Markup


def tables(
    before: Evaluation | None, after: Evaluation | None, comparison: Comparison | None
) -> dict[str, list[TableRow]]:
    """One table for each score of two evaluations, of which one may be absent; the main score comes first.

    A row is a task; the last one is the mean over tasks.
    """
    measured = before or after
    if measured is None:
        return {}
    main = main_score(measured.score_names)
    columns = [{**part.tasks, OVERALL: part.overall} if part else {} for part in (before, after, comparison)]
    result: dict[str, list[TableRow]] = {}
    for score in sorted(measured.score_names, key=lambda name: name != main):
        gains = {task: possible(score, row[score], least=-1.0) for task, row in columns[2].items() if score in row}
        bounds = [bound for gain in gains.values() for bound in (gain.low, gain.high) if gain.has_interval]
        limits = min(bounds, default=0.0), max(bounds, default=0.0)
        result[score] = []
        for task in (*measured.tasks, OVERALL):
            old, new = (column.get(task, {}).get(score) for column in columns[:2])
            gain = gains.get(task)
            drawn = whisker(gain, limits, f"gain {signed(score, gain.mean)}") if gain else Markup()
            result[score].append(TableRow(task, old, new, gain, drawn))
    return result


def gallery(pairs: Sequence[SamplePair], page: Path) -> dict[str, Any]:
    """The pairs that worsened most, and improvements in the order of ``gallery_improvements``, as many as fit.

    Args:
        pairs: All pairs, sorted by gain.
        page: The folder of the page, with the evaluations ``before/`` and ``after/``.

    Returns:
        What the template shows: ``regressions``, ``improvements``, and how many pairs had their content ``repaired``.
    """
    before, after = page / "before", page / "after"

    def cards(selected: Iterable[SamplePair]) -> list[PairCard]:
        drawn = ((p, drawing(before, p.before.image, page), drawing(after, p.after.image, page)) for p in selected)
        return fitting(drawn, lambda card: [picture for picture, _ in card[1:]])

    return {
        "regressions": cards(pair for pair in pairs[:MAX_PAIRS] if first_difference(pair) < 0),
        "improvements": cards(gallery_improvements(pairs)[:MAX_PAIRS]),
        "repaired": sum(pair.content_repaired for pair in pairs),
    }


def flattened(value: Any, name: str = "") -> dict[str, str]:
    """Write JSON as lines: nested keys are joined by dots, and lists stay on one line."""
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        nested = (flattened(inner, f"{prefix}{key}") for key, inner in value.items())
        return {key: text for lines in nested for key, text in lines.items()}
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
