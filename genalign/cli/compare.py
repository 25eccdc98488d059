"""``genalign compare``: recipes trained at equal budget, side by side."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import Path_fr, register_type

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_table
from genalign.cli.error_messages import error_line
from genalign.cli.resume import require_unchanged
from genalign.cli.train import train_command
from genalign.cli.train_settings import Train
from genalign.evaluation.compare_runs import RecipeSummary, summarize_recipes, write_recipe_summaries
from genalign.evaluation.report import write_comparison
from genalign.evaluation.report.comparison_page import budget_words, cost_words
from genalign.evaluation.report.words import count, duration, gain_verdict, possible, prompts, seeds_words
from genalign.evaluation.standings import Standings, common_score, shared_looks, standings, write_standings
from genalign.runtime.files import write_json
from genalign.training.errors import TrainingStoppedError
from genalign.worlds.registry import diversity_of

SOME_FAILED = 3
"""The exit status of a comparison in which a run stopped during its training."""
_ERROR = "error.json"  # in the folder of such a run


class OwnSettings:
    """Settings that are parsed together with those of the base; ``plain`` holds them as JSON until then."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain


register_type(OwnSettings, serializer=lambda own: own.plain)


@dataclass(frozen=True)
class Compare:
    """Recipes side by side: each is trained on the base configuration, with settings of its own and with every seed.

    Args:
        output: Folder of all runs and of the comparison.
        base: A training configuration; its path is relative to the file of the comparison.
        runs: Named runs, with their settings that override those of the base.
        seeds: Seeds of the training runs.
        only: Names of the runs to train and compare, where not all of ``runs``.
        first_seed_only: Names of runs that are trained only with the first seed.
        budgets: "equal" refuses runs with different training.rounds, training.max_nfe, max_seconds or time_budget;
            "own" trains them, without standings at equal cost.
        variants: Named settings that override those of every run: each run is trained with each of them, as RUN-NAME.
    """

    output: str
    base: Path_fr
    runs: dict[str, OwnSettings]
    seeds: list[int]
    only: list[str] = field(default_factory=list)
    first_seed_only: list[str] = field(default_factory=list)
    budgets: Literal["equal", "own"] = "equal"
    variants: dict[str, OwnSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs or not self.seeds:
            raise ValueError("a comparison needs at least one entry in runs and one in seeds")
        if wrong := [name for name in (*self.runs, *self.variants) if not re.fullmatch(r"[\w+-][\w .+-]*", name)]:
            raise ValueError(f"{wrong[0]!r} cannot name a run's folder: use letters, digits, _, -, + and .")
        for setting in ("only", "first_seed_only"):
            if unknown := set(getattr(self, setting)) - set(self.runs):
                raise ValueError(f"{setting} names {', '.join(sorted(unknown))}, which is not among the runs")

    def require_equal_budgets(self, settings: Mapping[str, Train]) -> None:
        """Raise ValueError if the budgets of the runs differ but must be equal.

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
        """List every (run, seed), seed by seed, so an unfinished comparison has equally many seeds of each run."""
        trained = [run for run in self.runs if run in self.only or not self.only]
        names = {run: [f"{run}-{name}" for name in self.variants] or [run] for run in trained}
        return [
            (name, seed)
            for place, seed in enumerate(self.seeds)
            for run in trained
            if place == 0 or run not in self.first_seed_only
            for name in names[run]
        ]


def compare_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Train every recipe of a comparison file with every seed, and write a page that compares them.

    Finished runs are not repeated, and interrupted ones are resumed. A run that stops during its training is left out
    of the comparison, and tried again only once its folder is deleted; the others go on.

    Returns:
        The exit status: ``SOME_FAILED`` where a run has stopped, else 0.

    Raises:
        ValueError: The runs have unequal budgets, or one that has ended was trained with other settings.
        SystemExit: A run was interrupted.
    """
    if not arguments:
        raise ValueError("give a comparison file: genalign compare scripts/configs/compare/shapes_methods.yaml")
    settings, plain = parsing.parse(Compare, arguments, "compare", first="config")
    output, runs, base = Path(settings.output), own_settings(plain), settings.base.absolute
    folders = {(name, seed): output / name / f"seed-{seed}" for name, seed in settings.jobs()}
    requested = {name: run_settings(base, name, own) for name, own in runs.items()}
    settings.require_equal_budgets({name: own for name, (own, _) in requested.items()})
    _require_unchanged(folders, requested)

    # Train
    for number, ((name, seed), run) in enumerate(folders.items(), start=1):
        print(f"run {number}/{len(folders)}: {name}, seed {seed}, {run}", flush=True)
        if has_failed(run) or (run / "gain.json").exists():
            continue
        own = output / name / "settings.json"
        write_json(own, runs[name])
        training = ["--config", base, "--config", str(own), "--output", str(run), "--training.seed", str(seed)]
        own_time = replace(context, started=time.monotonic())
        try:
            if status := train_command(own_time, [*training, "--resume"]):
                raise SystemExit(status)
        except TrainingStoppedError as error:
            write_json(run / _ERROR, {"error": type(error.__cause__).__name__, "message": error_line(error)})
            print(f"failed: {error_line(error)}", flush=True)

    # Compare
    finished: dict[str, dict[int, Path]] = {}
    for (name, seed), run in folders.items():
        if not has_failed(run):
            finished.setdefault(name, {})[seed] = run
    if finished:
        _write_comparison(output, finished, settings.budgets == "equal")
    failed = [run for run in folders.values() if has_failed(run)]
    for run in failed:
        message = json.loads((run / _ERROR).read_text(encoding="utf-8"))["message"]
        print(f"failed, and not compared: {run}: {message}. To train it from its start, delete this folder")
    return SOME_FAILED if failed else 0


def has_failed(run: Path) -> bool:
    """Whether a run of a comparison stopped during its training, and was not resumed by hand to its end."""
    return (run / _ERROR).is_file() and not (run / "gain.json").is_file()


def _require_unchanged(
    folders: Mapping[tuple[str, int], Path], requested: Mapping[str, tuple[Train, Mapping[str, Any]]]
) -> None:
    """Raise ConfigurationError that names every run that has ended but has other settings than are requested."""
    problems = []
    for (name, seed), run in folders.items():
        if not (has_failed(run) or (run / "gain.json").is_file()):
            continue
        settings, plain = requested[name]
        try:
            require_unchanged(run, settings, {**plain, "training": plain["training"] | {"seed": seed}})
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise parsing.ConfigurationError(*problems)


def _write_comparison(output: Path, recipes: Mapping[str, Mapping[int, Path]], equal_budgets: bool) -> None:
    """Write the files that compare finished runs, and print the gains and the standings."""
    summaries = summarize_recipes(recipes, diversity_of)
    equal = _standings(recipes, next(iter(summaries[0].scores))) if equal_budgets else []
    write_recipe_summaries(output / "comparison.json", summaries)
    write_standings(output / "standings.json", equal)
    write_comparison(output / "comparison.html", summaries, recipes, equal)
    _print_gains(summaries, bool(equal))
    for one in equal:
        _print_standings(one)
    print(f"comparison: {output / 'comparison.html'}")


def own_settings(plain: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of each run to train that override those of the base, combined with those of each variant.

    Args:
        plain: The settings of a comparison as plain JSON.

    Raises:
        ValueError: A run or a variant is not a mapping of settings.
    """
    for section in ("runs", "variants"):
        for name, own in plain[section].items():
            if not isinstance(own, Mapping):
                raise ValueError(f"{section}.{name} must be a mapping of settings, as in {{training: {{rounds: 9}}}}")
    trained = {run: own for run, own in plain["runs"].items() if run in plain["only"] or not plain["only"]}
    if not plain["variants"]:
        return trained
    return {
        f"{run}-{name}": _replaced(own, variant)
        for run, own in trained.items()
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


def run_settings(base: str, name: str, own: Mapping[str, Any]) -> tuple[Train, dict[str, Any]]:
    """Parse the settings of a run before any is trained; return them, and as plain JSON.

    Raises ConfigurationError that names the run.

    Args:
        base: The path of the base configuration.
        name: The name of the run.
        own: Its settings that override those of the base.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        write_json(file, own)
        try:
            arguments = ["--config", base, "--config", str(file), "--output", name]
            return parsing.parse(Train, arguments, "train")
        except parsing.ConfigurationError as error:
            raise parsing.ConfigurationError(*(f"run {name}: {problem}" for problem in error.problems)) from error


def _standings(recipes: Mapping[str, Mapping[int, Path]], main: str) -> list[Standings]:
    """Read the standings at equal NFE and at equal seconds; if there are none, print why."""
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
