"""The page about several recipes: what each gained, what it cost, curves, and samples from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genalign.evaluation.compare_runs import RecipeSummary, equal_budgets
from genalign.evaluation.paired import pairs
from genalign.evaluation.report.curves import Axis, Point, line_color, lines_chart, whisker
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.reading import Run, read_run
from genalign.evaluation.report.samples import Drawing, drawing, fitting
from genalign.evaluation.report.sections import flattened
from genalign.evaluation.report.summary import subject
from genalign.evaluation.report.words import (
    SHARES,
    count,
    duration,
    gain_verdict,
    number,
    percent,
    plain,
    possible,
    seeds_words,
    signed,
)
from genalign.evaluation.standings import Standings, mean_curve

_PROMPTS = 8  # whose samples stand side by side


@dataclass(frozen=True)
class RecipeRow:
    """A recipe as the table has it: its summary, its verdict, the color of its curve, and its interval drawn."""

    summary: RecipeSummary
    verdict: str
    color: str
    whisker: Markup


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and one sample of each model from the same noise, by name."""

    prompt: str
    samples: Mapping[str, Drawing]


@dataclass(frozen=True)
class StandingRow:
    """A recipe at the common budget: its place, score, last rise, and how far the best one is ahead, in words."""

    name: str
    color: str
    score: str
    behind: str
    rise: str
    seeds: int


@dataclass(frozen=True)
class StandingsTable:
    """Standings at equal cost as the page has them, with the curves of all recipes against this cost."""

    title: str
    best: str
    rows: list[StandingRow]
    pairs: dict[str, str]
    chart: Markup

    @classmethod
    def of(cls, equal: Standings, order: Sequence[str]) -> StandingsTable:
        """Draw standings in the colors of ``order``, the names of the recipes."""
        colors = {name: line_color(place) for place, name in enumerate(order)}
        rows = []
        for one in equal.recipes:
            behind = equal.behind(one.name)
            score = seeds_words(possible(equal.score, one.score, least=0.0), ".3f")
            rise = seeds_words(possible(equal.score, one.rise, least=-1.0), "+.3f")
            rows.append(StandingRow(one.name, colors[one.name], score, behind.words if behind else "", rise, one.seeds))
        title = f"Held-out {plain(equal.score)} score at equal {cost_words(equal)}"
        pairs = {f"{pair.first} minus {pair.second}": pair.words for pair in equal.differences}
        return cls(title, equal.recipes[0].name, rows, pairs, _mean_curves(equal, order))


def _mean_curves(equal: Standings, order: Sequence[str]) -> Markup:
    """Draw the mean over seeds of every recipe against the cost, with its interval at the common budget."""
    scores, series = {one.name: possible(equal.score, one.score, least=0.0) for one in equal.recipes}, {}
    for name in order:
        curve, score = mean_curve(equal.curves[name].values()), scores[name]
        points = [Point(x, y) for x, y in zip(curve.costs, curve.scores, strict=True)]
        interval = (score.low, score.high) if score.has_interval else None
        series[name] = [*(p for p in points if p.x < equal.budget), Point(equal.budget, score.mean, interval)]
    x_axis = Axis("NFE", count) if equal.cost == "nfe" else Axis("minutes of training", number, unit=60)
    y_axis = Axis("score", percent if equal.score in SHARES else number)
    return lines_chart(series, x_axis, y_axis, f"held-out {plain(equal.score)}, mean over seeds")


def cost_words(equal: Standings) -> str:
    """The cost that is equal, and its amount: "NFE (41.2k)"."""
    nfe = f"NFE ({count(equal.budget)})"
    return nfe if equal.cost == "nfe" else f"seconds of training ({duration(equal.budget)})"


def write_comparison(
    path: Path,
    summaries: Sequence[RecipeSummary],
    recipes: Mapping[str, Mapping[int, Path]] | None = None,
    equal: Sequence[Standings] = (),
) -> None:
    """Write one offline HTML page at ``path`` that compares recipes, best first.

    Args:
        path: The file.
        summaries: The recipes, at least one.
        recipes: The folders of each recipe's runs by seed, for curves and samples; of each the first is drawn.
        equal: Their standings at equal NFE and at equal seconds, if there are any.
    """
    ordered = sorted(summaries, key=lambda recipe: -recipe.gain)
    main = next(iter(ordered[0].scores))
    gains = [possible(main, recipe.estimate, least=-1.0) for recipe in ordered]
    bounds = [bound for gain in gains for bound in (gain.low, gain.high) if gain.has_interval]
    limits = min(bounds, default=0.0), max(bounds, default=0.0)
    first = {name: read_run(next(iter(runs.values()))) for name, runs in (recipes or {}).items()}
    rows = [
        RecipeRow(
            recipe,
            gain_verdict(recipe.estimate, recipe.effect).text,
            line_color(place),
            whisker(gain, limits, f"gain {signed(main, recipe.gain)}"),
        )
        for place, (recipe, gain) in enumerate(zip(ordered, gains, strict=True))
    ]
    write_page(
        path,
        "comparison.html.j2",
        main=main,
        rows=rows,
        budgets=budget_words(ordered, bool(equal)),
        equal_nfe=len(ordered) > 1 and equal_budgets(recipe.nfe_range for recipe in ordered),
        settings=_settings({name: run.config for name, run in first.items()}),
        model=next((subject({key: run.config.get(key) for key in ("model", "prompts")}) for run in first.values()), ""),
        standings=[StandingsTable.of(one, [recipe.name for recipe in ordered]) for one in equal],
        charts=_charts(main, {recipe.name: first[recipe.name] for recipe in ordered if recipe.name in first}),
        samples=_samples({recipe.name: first[recipe.name] for recipe in ordered if recipe.name in first}, path.parent),
    )


def _settings(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The settings that all recipes share, and those in which each one differs from another; no folders."""
    lines = {name: flattened(config) for name, config in configs.items()}
    for settings in lines.values():
        settings.pop("output", None)
    shared = {
        key: value
        for key, value in next(iter(lines.values()), {}).items()
        if all(settings.get(key) == value for settings in lines.values())
    }
    own = {name: {k: v for k, v in settings.items() if k not in shared} for name, settings in lines.items()}
    titled = {"Settings that all recipes share": shared} | {f"Settings of {name}": part for name, part in own.items()}
    return {title: part for title, part in titled.items() if part}


def budget_words(summaries: Sequence[RecipeSummary], has_standings: bool = False) -> str:
    """Say whether the recipes had equal budgets, in NFE and in seconds; without standings, how to make them equal."""
    if len(summaries) < 2:
        return "One recipe, so no budgets to compare."
    nfe, minutes = [recipe.nfe_range for recipe in summaries], [recipe.minutes_range for recipe in summaries]
    spans = (
        f"{count(min(low for low, _ in nfe))} to {count(max(high for _, high in nfe))} NFE",
        f"{duration(60 * min(low for low, _ in minutes))} to {duration(60 * max(high for _, high in minutes))}"
        " of training",
    )
    verdicts = ("equal within 5 %" if equal_budgets(ranges) else "not equal" for ranges in (nfe, minutes))
    budgets = ", and ".join(f"{span} ({verdict})" for span, verdict in zip(spans, verdicts, strict=True))
    advice = " Set training.max_nfe in the base configuration to compare at equal NFE."
    advice = "" if has_standings or equal_budgets(nfe) else advice
    return f"The runs took {budgets}.{advice}"


def _charts(main: str, runs: Mapping[str, Run]) -> dict[str, Markup]:
    """Draw the held-out main score and the training reward of all recipes against NFE, where every run has them."""
    charts = {}
    for title, series in {
        f"{plain(main)} score during training": {
            name: [
                Point(row["nfe"], row["held_out"][main]["mean"])
                for row in run.rows
                if main in (row.get("held_out") or {})
            ]
            for name, run in runs.items()
        },
        "Training reward": {name: [Point(row["nfe"], row["reward"]) for row in run.rows] for name, run in runs.items()},
    }.items():
        if runs and all(series.values()):
            share = main in SHARES and "score" in title
            axis = Axis("score" if share else "", percent if share else number)
            charts[title] = lines_chart(series, Axis("NFE", count), axis, title)
    return charts


def _samples(runs: Mapping[str, Run], page: Path) -> list[PromptRow]:
    """Draw samples of some prompts, evenly spaced, before training and by each recipe, for a page in a folder."""
    if len(runs) < 2 or not all(run.before and run.after for run in runs.values()):
        return []
    base = next(iter(runs.values()))
    assert base.before is not None and base.after is not None  # checked above
    after = {other: {r.key: r for r in run.after.records} for other, run in runs.items() if run.after}
    firsts = {pair.before.prompt: pair.before for pair in reversed(pairs(base.before, base.after))}
    shared = [r for r in reversed(firsts.values()) if r.image and all(r.key in records for records in after.values())]
    drawn = shared[:: max(1, len(shared) // _PROMPTS)][:_PROMPTS]
    rows = (
        PromptRow(
            record.prompt,
            {"before": drawing(base.folder / "before", record.image, page)}
            | {other: drawing(runs[other].folder / "after", after[other][record.key].image, page) for other in runs},
        )
        for record in drawn
    )
    return fitting(rows, lambda row: [picture for picture, _ in row.samples.values()])
