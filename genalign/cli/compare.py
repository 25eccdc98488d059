"""The commands ``calibrate``, ``compare`` and ``report``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from genalign.cli import config, parsing
from genalign.cli.context import CommandContext, load_with_lora, named_rewards, print_table, prompt_set
from genalign.cli.train import train_command
from genalign.evaluation.compare_runs import RecipeSummary, summarize_recipes, write_recipe_summaries
from genalign.evaluation.report import write_comparison, write_report
from genalign.evaluation.report.comparison_page import budget_words, cost_words
from genalign.evaluation.report.words import count, duration, gain_verdict, possible, prompts, seeds_words
from genalign.evaluation.standings import Standings, common_score, shared_looks, standings, write_standings
from genalign.prompts import PromptSampler
from genalign.runtime.files import write_json
from genalign.training.noise_calibration import calibrate, save_kernel
from genalign.training.run_folder import RunFolder
from genalign.training.sampler import Sampler
from genalign.worlds.registry import diversity_of


def calibrate_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Find the noise level of each sampling step, and write a kernel that uses them."""
    settings, _ = parsing.parse(config.Calibrate, arguments, "calibrate")
    source, sampling = prompt_set(settings.prompts), settings.sampling
    pipeline, rewards = load_with_lora(context, settings.model, None), named_rewards(settings.rewards)
    pipeline.encode_ahead([prompt.text for prompt in source.prompts])
    training, guidance = (
        settings.training.fit(source, settings.recipe.objective.unit),
        sampling.guidance_scale(pipeline),
    )
    sampler = Sampler(pipeline, rewards, sampling.grid(pipeline), guidance, training, keep_samples=False)
    rounds = PromptSampler(source, training.prompts_per_round, training.seed).rounds()
    for number, kernel in enumerate(calibrate(sampler, settings.recipe, rounds, settings.calibration), start=1):
        levels = " ".join(f"{level:.2f}" for level in kernel.levels)
        print(f"{number}/{settings.calibration.iterations}  noise levels {levels}", flush=True)
        save_kernel(kernel, Path(settings.output))
    print(f"Train with it: --recipe.kernel genalign.calibrated --recipe.kernel.path {settings.output}")
    return 0


def compare_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Train every recipe of a comparison file with every seed, and write a page that compares them.

    Finished runs are not repeated, and interrupted ones are resumed.
    """
    if not arguments:
        raise ValueError("give the comparison's file: genalign compare scripts/configs/compare/shapes_methods.yaml")
    settings, plain = parsing.parse(config.Compare, arguments, "compare", first="config")
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
    """
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


def run_settings(base: str, name: str, own: Mapping[str, Any]) -> config.Train:
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
            return cast(config.Train, parsing.parse(config.Train, arguments, "train")[0])
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


def report_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Write the report of a run, finished or not."""
    settings, _ = parsing.parse(config.Report, arguments, "report", first="run")
    folder = Path(settings.run)
    RunFolder(folder).require_format()
    print(f"report: {write_report(folder)}")
    return 0
