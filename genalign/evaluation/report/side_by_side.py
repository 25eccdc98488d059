"""The page that compares several recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from genalign.evaluation.compare_runs import RecipeSummary
from genalign.evaluation.report.curves import whisker
from genalign.evaluation.report.html import page
from genalign.evaluation.report.words import count, signed
from genalign.metrics.intervals import Estimate
from genalign.runtime.files import write_text

_EQUAL_NFE = 1.05  # the largest ratio of costs that counts as an equal budget


def write_comparison(path: Path, summaries: Sequence[RecipeSummary]) -> None:
    """Write one offline HTML page at ``path``, best recipe first."""
    ordered = sorted(summaries, key=lambda summary: -summary.gain)
    main = next(iter(ordered[0].scores))
    limits = min(summary.low for summary in ordered), max(summary.high for summary in ordered)
    recipes = []
    for summary in ordered:
        gain = Estimate(summary.gain, summary.low, summary.high, summary.seeds)
        recipes.append((summary, gain, whisker(gain, limits, f"gain {signed(main, gain.mean)}")))
    costs = [summary.nfe for summary in ordered]
    text = page("comparison.html.j2").render(
        name=path.resolve().parent.name,
        main=main,
        recipes=recipes,
        equal=max(costs) <= _EQUAL_NFE * min(costs),
        nfe=f"{count(min(costs))} to {count(max(costs))}",
    )
    write_text(path, text)
