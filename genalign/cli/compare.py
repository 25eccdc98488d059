"""``genalign calibrate``, ``genalign compare`` and ``genalign report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genalign.cli import config
from genalign.cli.context import CommandContext, named_rewards, prompt_set
from genalign.cli.train import train_command
from genalign.evaluation.compare_runs import Contender, standings, write_standings
from genalign.evaluation.report import write_comparison, write_report
from genalign.prompts import PromptSampler
from genalign.runtime.files import write_json
from genalign.training.noise_calibration import calibrate, save_kernel
from genalign.training.run import RunFolder
from genalign.training.sampler import Sampler
from genalign.worlds.registry import diversity_of


def calibrate_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign calibrate``."""
    settings, _ = config.parse(config.Calibrate, arguments, "calibrate")
    pipeline, training = context.load(settings.model), settings.training
    sampler = Sampler(
        pipeline,
        named_rewards(settings.rewards),
        settings.sampling.grid(pipeline),
        settings.sampling.guidance,
        training.group_size,
        training.batch_size,
    )
    rounds = PromptSampler(prompt_set(settings.prompts), training.prompts_per_round, training.seed).rounds()
    for number, kernel in enumerate(calibrate(sampler, settings.recipe, rounds, settings.calibration), start=1):
        levels = " ".join(f"{level:.2f}" for level in kernel.levels)
        print(f"{number}/{settings.calibration.iterations}  noise levels {levels}", flush=True)
        save_kernel(kernel, Path(settings.output))
    print(f"use it as recipe.kernel: genalign.training.noise_calibration.calibrated, path: {settings.output}")
    return 0


def compare_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign compare``; finished runs are kept, so that it goes on where it stopped."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("give the comparison's file: genalign compare scripts/configs/compare/shapes_methods.yaml")
    source = Path(arguments[0])
    settings, plain = config.parse(config.Compare, ["--config", str(source), *arguments[1:]], "compare")
    output = Path(settings.output)
    for name, seed in settings.jobs():
        if not (output / name / f"seed-{seed}" / "gain.json").exists():
            _compared_run(context, output / name, source.parent / settings.base, plain["runs"][name], seed)
    contenders = [
        Contender(name, {seed: output / name / f"seed-{seed}" for other, seed in settings.jobs() if other == name})
        for name in settings.runs
    ]
    found = standings(contenders, diversity_of)
    write_standings(output / "comparison.json", found)
    write_comparison(output / "comparison.html", found)
    print(f"comparison: {output / 'comparison.html'}")
    return 0


def _compared_run(context: CommandContext, folder: Path, base: Path, own: Mapping[str, Any], seed: int) -> None:
    """One training by ``base`` with its ``own`` settings; one that was interrupted goes on."""
    run = folder / f"seed-{seed}"
    write_json(folder / "settings.json", own)
    arguments = ["--config", str(base), "--config", str(folder / "settings.json")]
    if status := train_command(context, [*arguments, "--output", str(run), "--training.seed", str(seed), "--resume"]):
        raise SystemExit(status)


def report_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign report RUN``."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError("give one run folder: genalign report runs/demo")
    folder = Path(arguments[0])
    RunFolder(folder).require_format()
    print(write_report(folder))
    return 0
