"""The command ``genalign``: the one place where the core, the pipelines and the rewards are put together."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from genalign import assets, config
from genalign.calibration import calibrate, save_kernel
from genalign.checkpoints import write_json
from genalign.comparison import Contender, standing, write_standings
from genalign.evaluation import Evaluation, Job, Protocol, evaluate, gain, plan, suite_hash
from genalign.policy import Policy
from genalign.prompts import PromptSampler, load_prompts
from genalign.report import write_comparison, write_report
from genalign.rollout import generate
from genalign.runs import RunFolder, train
from genalign.sampling import Sampler, Sampling
from genalign.scoring import NamedReward, RewardError, probe
from genalign.statistics import Estimate
from genalign.training import Trainer
from genalign.types import PromptSet, RewardFunction
from genalign.worlds import shapes
from genalign.worlds.shapes.diversity import evaluation_diversity
from pipelines import SD3
from rewards.shapes import ShapesReward

logger = logging.getLogger(__name__)
USAGE = """usage: genalign COMMAND ...

  train     --config FILE [--key value ...]       fine-tune a model on a reward
  evaluate  shapes --output DIR [--lora DIR ...]  measure a model in the shapes world
  calibrate --config FILE --output FILE.json       find the noise level that each sampling step bears
  compare   FILE                                   train several recipes at equal budget, and set them side by side
  report    RUN                                   write RUN/report.html
  demo      [--output DIR]                        watch the embedded model learn, in minutes

genalign COMMAND --help lists the settings of a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input is told in one line on standard error, with exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": train_command,
        "evaluate": evaluate_command,
        "calibrate": calibrate_command,
        "compare": compare_command,
        "report": report_command,
        "demo": demo_command,
    }
    if name not in commands:
        print(f"error: no command {name!r}; {config.nearest(name, list(commands))}", file=sys.stderr)
        return 2
    try:
        return commands[name](rest)
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train_command(arguments: Sequence[str]) -> int:
    """``genalign train``."""
    settings, plain = config.parse(config.Train, arguments, "train")
    return run_training(settings, plain)


def run_training(settings: config.Train, plain: Mapping[str, Any]) -> int:
    """Evaluate, train, evaluate again, and write the report."""
    prompts = prompt_set(settings.prompts)
    folder = RunFolder(Path(settings.output))
    pipeline = load_model(settings.model)
    rewards = named_rewards(settings)
    _probe(pipeline, rewards, prompts, settings.sampling)
    policy = Policy(pipeline.denoiser, settings.lora, settings.averaging, settings.training.seed)
    trainer = Trainer(pipeline, policy, rewards, prompts, settings.recipe, settings.training, settings.sampling)
    folder.begin(plain)
    tested = _before_after(settings, pipeline, rewards)
    before = tested.take(pipeline, folder.path / "before") if tested else None
    finished = train(
        trainer,
        folder,
        pipeline,
        _watcher(settings, pipeline, policy),
        settings.held_out.every,
        trackers(settings.trackers, folder.path),
    )
    if not finished:
        print(f"interrupted: everything so far is in {folder.path}")
        return 130
    if tested and before:
        with policy.averaged():
            after = tested.take(pipeline, folder.path / "after")
        _write_gain(before, after, folder.path)
    print(f"report: {write_report(folder.path)}")
    return 0


def named_rewards(settings: config.Train) -> list[NamedReward]:
    """The rewards of a configuration."""
    return [NamedReward(name, choice.function, choice.weight) for name, choice in settings.rewards.items()]


def load_model(model: config.Model) -> SD3:
    """The pipeline that a configuration names, opened without the libraries' own progress bars."""
    disable_diffusers_bars()
    disable_transformers_bars()
    return SD3.load(
        assets.resolve(model.path),
        dtype=config.dtype(model.dtype),
        device=model.device,
        autocast=config.dtype(model.autocast) if model.autocast else None,
        height=model.height,
        width=model.width,
        max_sequence_length=model.max_sequence_length,
        offload=model.offload,
    )


def prompt_set(source: str) -> PromptSet:
    """A split of a world, as in "shapes:train", some of its tasks, as in "shapes:train:counting,colors", or a prompt
    file."""
    world, *rest = source.split(":")
    if world != "shapes" or len(rest) not in (1, 2):
        return load_prompts(Path(source))
    found = shapes.prompts(rest[0])
    return found if len(rest) == 1 else found.of_tasks(rest[1].split(","))


def trackers(names: Sequence[str], folder: Path) -> list[Any]:
    """Experiment trackers, through accelerate, which names what must be installed for each."""
    if not names:
        return []
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    accelerator.init_trackers("genalign")
    return list(accelerator.trackers)


def _probe(pipeline: SD3, rewards: Sequence[NamedReward], prompts: PromptSet, sampling: Sampling) -> None:
    """Two images of the untrained model through every reward, before anything is written."""
    chosen = prompts.prompts[:2]
    texts = [prompt.text for prompt in chosen]
    images = next(generate(pipeline, texts, [0] * len(texts), sampling.grid(pipeline), sampling.guidance, len(texts)))
    probe(rewards, images, chosen)


@dataclass(frozen=True)
class Exam:
    """What is to be made and scored, and how."""

    jobs: tuple[Job, ...]
    scorers: Mapping[str, RewardFunction]
    protocol: Protocol

    def take(self, pipeline: SD3, output: Path | None = None) -> Evaluation:
        """Evaluate the pipeline as it is now."""
        return evaluate(pipeline, self.jobs, self.scorers, self.protocol, output)


def exam(
    pipeline: SD3,
    model: config.Model,
    sampling: Sampling,
    amount: config.Amount,
    prompts: PromptSet,
    scorers: Mapping[str, RewardFunction],
) -> Exam:
    """``amount`` of images of ``prompts``; the shapes world's own scorers where the prompts are its own."""
    own = prompts.name in shapes.SUITES
    protocol = Protocol(
        suite=prompts.name,
        suite_hash=suite_hash(prompts),
        guidance=sampling.guidance,
        sigmas=tuple(sampling.grid(pipeline).sigma.tolist()),
        kernel="ODE()",
        dtype=model.autocast or model.dtype,
        batch_size=amount.batch_size,
        resolution=(pipeline.height * pipeline.pipe.vae_scale_factor, pipeline.width * pipeline.pipe.vae_scale_factor),
        seeds=amount.seeds,
        images_per_task=amount.images_per_task,
        verifier=shapes.VERIFIER_VERSION,
    )
    jobs = plan(prompts, amount.images_per_task, amount.seeds)
    return Exam(jobs, shapes_scorers() if own else scorers, protocol)


def shapes_scorers() -> dict[str, RewardFunction]:
    """Strict, partial and relaxed scores of the exact verifier."""
    return {"strict": ShapesReward("strict"), "partial": ShapesReward("partial"), "relaxed": ShapesReward("relaxed")}


def _before_after(settings: config.Train, pipeline: SD3, rewards: Sequence[NamedReward]) -> Exam | None:
    chosen = settings.before_after
    if chosen is None:
        return None
    scorers = {reward.name: reward.function for reward in rewards}
    sampling = settings.evaluation or settings.sampling
    return exam(pipeline, settings.model, sampling, chosen, prompt_set(chosen.prompts), scorers)


def _watcher(settings: config.Train, pipeline: SD3, policy: Policy) -> Callable[[], dict[str, Estimate]] | None:
    chosen = settings.held_out
    if not chosen.every:
        return None
    sampling = settings.evaluation or settings.sampling
    watched = exam(pipeline, settings.model, sampling, chosen, prompt_set(chosen.prompts), chosen.scorers)

    def watch() -> dict[str, Estimate]:
        with policy.averaged():
            return watched.take(pipeline).overall

    return watch


def _write_gain(before: Evaluation, after: Evaluation, folder: Path) -> None:
    gains = gain(before, after)
    write_json(folder / "gain.json", {name: estimate.as_dict() for name, estimate in gains.items()})
    print_table(before, after)


def print_table(before: Evaluation, after: Evaluation) -> None:
    """Before, after and gain with intervals, per task and overall, of the first score."""
    from rich.console import Console
    from rich.table import Table

    from genalign.evaluation import task_gains

    score = before.score_names[0]
    table = Table("task", "before", "after", "gain (95% interval)", title=f"{before.protocol.suite}: {score}")
    rows = {task: estimates[score] for task, estimates in task_gains(before, after).items()}
    for task, difference in (rows | {"overall": gain(before, after)[score]}).items():
        old = before.overall[score] if task == "overall" else before.tasks[task][score]
        new = after.overall[score] if task == "overall" else after.tasks[task][score]
        interval = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
        table.add_row(task, f"{old.mean:.3f}", f"{new.mean:.3f}", interval)
    Console().print(table)


def evaluate_command(arguments: Sequence[str]) -> int:
    """``genalign evaluate shapes``."""
    if not arguments or arguments[0] != "shapes":
        raise ValueError("name the world: genalign evaluate shapes --output DIR")
    settings, _ = config.parse(config.EvaluateShapes, arguments[1:], "evaluate shapes")
    pipeline = load_model(settings.model)
    if settings.lora:
        pipeline.load_lora(Path(settings.lora))
    asked = exam(pipeline, settings.model, settings.sampling, settings, shapes.prompts(settings.suite), {})
    made = asked.take(pipeline, Path(settings.output))
    for task, estimates in (made.tasks | {"overall": made.overall}).items():
        print(f"{task:14s}" + "  ".join(f"{name} {value.mean:.3f}" for name, value in estimates.items()))
    return 0


def calibrate_command(arguments: Sequence[str]) -> int:
    """``genalign calibrate``."""
    settings, _ = config.parse(config.Calibrate, arguments, "calibrate")
    pipeline, training = load_model(settings.model), settings.training
    sampler = Sampler(
        pipeline,
        named_rewards(settings),
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
    print(f"use it as recipe.kernel: genalign.calibration.calibrated, path: {settings.output}")
    return 0


def compare_command(arguments: Sequence[str]) -> int:
    """``genalign compare``; finished runs are kept, so that it goes on where it stopped."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("give the comparison's file: genalign compare scripts/configs/compare_shapes.yaml")
    source = Path(arguments[0])
    settings, plain = config.parse(config.Compare, ["--config", str(source), *arguments[1:]], "compare")
    output = Path(settings.output)
    for name, seed in settings.jobs():
        if not (output / name / f"seed-{seed}" / "gain.json").exists():
            _compared_run(output / name, source.parent / settings.base, plain["runs"][name], seed)
    contenders = [
        Contender(name, {seed: output / name / f"seed-{seed}" for other, seed in settings.jobs() if other == name})
        for name in settings.runs
    ]
    standings = [standing(contender, evaluation_diversity) for contender in contenders]
    write_standings(output / "comparison.json", standings)
    write_comparison(output / "comparison.html", standings)
    print(f"comparison: {output / 'comparison.html'}")
    return 0


def _compared_run(folder: Path, base: Path, own: Mapping[str, Any], seed: int) -> None:
    """One training by ``base`` with its ``own`` settings; a folder that an interruption left is begun anew."""
    run = folder / f"seed-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    write_json(folder / "settings.json", own)
    arguments = ["--config", str(base), "--config", str(folder / "settings.json")]
    if status := train_command([*arguments, "--output", str(run), "--training.seed", str(seed)]):
        raise SystemExit(status)


def report_command(arguments: Sequence[str]) -> int:
    """``genalign report RUN``."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError("give one run folder: genalign report runs/demo")
    print(write_report(Path(arguments[0])))
    return 0


def demo_command(arguments: Sequence[str]) -> int:
    """``genalign demo``: Flow-GRPO on the embedded shapes model, with the shipped configuration."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    shipped = str(files("genalign.assets").joinpath("demo.yaml"))
    return train_command(["--config", shipped, *arguments])


if __name__ == "__main__":
    raise SystemExit(main())
