"""``genalign compare``: recipes trained at equal budget, side by side."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from jsonargparse.typing import Path_fr, register_type

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_table
from genalign.cli.train import train_command
from genalign.cli.train_settings import Train
from genalign.evaluation.compare_runs import RecipeSummary, summarize_recipes, write_recipe_summaries
from genalign.evaluation.report import write_comparison
from genalign.evaluation.report.comparison_page import budget_words, cost_words
from genalign.evaluation.report.words import count, duration, gain_verdict, possible, prompts, seeds_words
from genalign.evaluation.standings import Standings, common_score, shared_looks, standings, write_standings
from genalign.runtime.files import write_json
from genalign.worlds.registry import diversity_of


class OwnSettings:
    """Settings that are parsed together with those of the base; ``plain`` is what they are until then, as JSON."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain


register_type(OwnSettings, serializer=lambda own: own.plain)


@dataclass(frozen=True)
class Compare:
    """Recipes side by side: each is trained on the base configuration, with settings of its own and with every seed.

    Args:
        output: Folder of all runs and of the comparison.
        base: A training configuration; its path is relative to the file of the comparison.
        runs: The settings of each run that replace those of the base, by the name of the run.
        seeds: Seeds of the training runs.
        once: Names of runs that are trained with the first seed only.
        budgets: "equal" refuses runs with different training.rounds, training.max_nfe, max_seconds or time_budget;
            "own" trains them, without standings at equal cost.
        variants: Settings by name that replace those of every run: each run is trained with each of them, as RUN-NAME.
    """

    output: str
    base: Path_fr
    runs: dict[str, OwnSettings]
    seeds: list[int]
    once: list[str] = field(default_factory=list)
    budgets: Literal["equal", "own"] = "equal"
    variants: dict[str, OwnSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs or not self.seeds:
            raise ValueError("a comparison needs at least one entry in runs and one in seeds")
        if wrong := [name for name in (*self.runs, *self.variants) if not re.fullmatch(r"[\w+-][\w .+-]*", name)]:
            raise ValueError(f"{wrong[0]!r} cannot name a run's folder: use letters, digits, _, -, + and .")
        if unknown := set(self.once) - set(self.runs):
            raise ValueError(f"once names {', '.join(sorted(unknown))}, which runs does not have")

    def require_equal_budgets(self, settings: Mapping[str, Train]) -> None:
        """Raise ValueError that names the runs and their budgets if these are not equal, but must be.

        Args:
            settings: The settings of every run by its name.
        """
        for name in ("training.rounds", "training.max_nfe", "max_seconds", "time_budget"):
            section, _, key = name.rpartition(".")
            values: dict[Any, list[str]] = {}
            for run, own in settings.items():
                values.setdefault(vars(getattr(own, section) if section else own)[key], []).append(run)
            if len(values) > 1 and self.budgets == "equal":
                parts = (f"{', '.join(runs)} {'has' if len(runs) == 1 else 'have'} {v}" for v, runs in values.items())
                raise ValueError(
                    f"the runs have unequal budgets: of {name}, {', and '.join(parts)}. Give all the same, or set"
                    " budgets: own to train them without standings at equal cost"
                )

    def jobs(self) -> list[tuple[str, int]]:
        """List every (run, seed), seed by seed, so that an unfinished comparison has as many seeds of each run."""
        names = {run: [f"{run}-{name}" for name in self.variants] or [run] for run in self.runs}
        return [
            (name, seed)
            for place, seed in enumerate(self.seeds)
            for run in self.runs
            if place == 0 or run not in self.once
            for name in names[run]
        ]


def compare_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Train every recipe of a comparison file with every seed, and write a page that compares them.

    Finished runs are not repeated, and interrupted ones are resumed.
    """
    if not arguments:
        raise ValueError("give the comparison's file: genalign compare scripts/configs/compare/shapes_methods.yaml")
    settings, plain = parsing.parse(Compare, arguments, "compare", first="config")
    output, jobs, runs = Path(settings.output), settings.jobs(), own_settings(plain)
    settings.require_equal_budgets(
        {name: run_settings(settings.base.absolute, name, own) for name, own in runs.items()}
    )

    # Train
    for number, (name, seed) in enumerate(jobs, start=1):
        run, own = output / name / f"seed-{seed}", output / name / "settings.json"
        print(f"run {number}/{len(jobs)}: {name}, seed {seed}, {run}", flush=True)
        if (run / "gain.json").exists():
            continue
        write_json(own, runs[name])
        training = ["--config", settings.base.absolute, "--config", str(own), "--output", str(run)]
        own_time = replace(context, started=time.monotonic())
        if status := train_command(own_time, [*training, "--training.seed", str(seed), "--resume"]):
            raise SystemExit(status)

    # Compare
    recipes = {name: {seed: output / name / f"seed-{seed}" for other, seed in jobs if other == name} for name in runs}
    summaries = summarize_recipes(recipes, diversity_of)
    equal = _standings(recipes, next(iter(summaries[0].scores))) if settings.budgets == "equal" else []
    write_recipe_summaries(output / "comparison.json", summaries)
    write_standings(output / "standings.json", equal)
    write_comparison(output / "comparison.html", summaries, recipes, equal)
    _print_gains(summaries, bool(equal))
    for one in equal:
        _print_standings(one)
    print(f"comparison: {output / 'comparison.html'}")
    return 0


def own_settings(plain: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of each run that replace those of the base, with those of each variant, by name.

    Args:
        plain: The settings of a comparison as plain JSON.

    Raises:
        ValueError: A run or a variant has something else than settings.
    """
    for section in ("runs", "variants"):
        for name, own in plain[section].items():
            if not isinstance(own, Mapping):
                raise ValueError(f"{section}.{name} must be settings by name, as in {{training: {{rounds: 9}}}}")
    if not plain["variants"]:
        return dict(plain["runs"])
    return {
        f"{run}-{name}": _replaced(own, variant)
        for run, own in plain["runs"].items()
        for name, variant in plain["variants"].items()
    }


def _replaced(settings: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Replace settings by others, section by section."""
    merged = dict(settings)
    for name, value in by.items():
        inner = merged.get(name)
        if isinstance(value, Mapping) and isinstance(inner, Mapping) and "class_path" not in value:
            value = _replaced(inner, value)
        merged[name] = value
    return merged


def run_settings(base: str, name: str, own: Mapping[str, Any]) -> Train:
    """Parse the settings of a run before any is trained. Raises ConfigurationError that names the run.

    Args:
        base: The path of the base configuration.
        name: The name of the run.
        own: Its settings that replace those of the base.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        write_json(file, own)
        try:
            arguments = ["--config", base, "--config", str(file), "--output", name]
            return cast(Train, parsing.parse(Train, arguments, "train")[0])
        except parsing.ConfigurationError as error:
            raise parsing.ConfigurationError(*(f"run {name}: {problem}" for problem in error.problems)) from error


def _standings(recipes: Mapping[str, Mapping[int, Path]], main: str) -> list[Standings]:
    """Read the standings at equal NFE and at equal seconds; print why where the runs have none."""
    try:
        looks = shared_looks(recipes)
        score = common_score(looks, main)
    except ValueError as error:
        print(f"No standings at equal cost: {error}")
        return []
    return [standings(looks, cost, score) for cost in ("nfe", "seconds")]


def _print_gains(summaries: Sequence[RecipeSummary], has_standings: bool) -> None:
    """Print the gain and the cost of every recipe, best first."""
    main, ordered = next(iter(summaries[0].scores)), sorted(summaries, key=lambda summary: -summary.gain)
    print_table(
        ("recipe", f"gain in {main} (95% interval)", "verdict", "seeds", "NFE", "training"),
        [
            (
                *(summary.name, summary.estimate.text("+.3f"), gain_verdict(summary.estimate, summary.effect).text),
                *(str(summary.seeds), " to ".join(dict.fromkeys(map(count, summary.nfe_range)))),
                " to ".join(dict.fromkeys(duration(60 * minutes) for minutes in summary.minutes_range)),
            )
            for summary in ordered
        ],
        f"{prompts(ordered[0].prompts)} evaluated",
    )
    print(budget_words(ordered, has_standings))


def _print_standings(equal: Standings) -> None:
    """Print the score of every recipe at the common budget, best first, and how far it is behind the best."""
    rows = []
    for one in equal.recipes:
        behind = equal.behind(one.name)
        score = seeds_words(possible(equal.score, one.score, least=0.0), ".3f")
        rows.append((one.name, score, behind.words if behind else "", str(one.seeds)))
    titles = ("recipe", f"{equal.score} (95% interval over seeds)", f"{equal.recipes[0].name} is ahead by", "seeds")
    print_table(titles, rows, f"held-out {equal.score} at equal {cost_words(equal)}")
