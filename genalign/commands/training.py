"""``genalign train`` and ``genalign demo``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from genalign import config
from genalign.checkpoints import write_json
from genalign.commands.evaluating import Exam, exam
from genalign.commands.parts import Checkpoint, Outside, named_rewards, prompt_set
from genalign.evaluation import Evaluation, gain, plan
from genalign.guard import Guard
from genalign.hacking import Looks, Measures
from genalign.learning import anchored
from genalign.policy import Policy
from genalign.report import write_report
from genalign.rollout import generate
from genalign.runs import RunFolder, train
from genalign.sampling import Sampling
from genalign.scoring import NamedReward, probe
from genalign.statistics import Estimate
from genalign.training import Trainer
from genalign.types import PromptSet


def train_command(outside: Outside, arguments: Sequence[str]) -> int:
    """``genalign train``."""
    settings, plain = config.parse(config.Train, arguments, "train")
    return run_training(outside, settings, plain)


def run_training(outside: Outside, settings: config.Train, plain: Mapping[str, Any]) -> int:
    """Evaluate, train, evaluate again, and write the report."""
    prompts = prompt_set(settings.prompts)
    folder = RunFolder(Path(settings.output))
    folder.require_unused()
    require_trackers(settings.trackers)
    for watched in settings.watched():
        prompt_set(watched.prompts)
    pipeline = outside.load(settings.model)
    rewards = named_rewards(settings.rewards)
    _probe(pipeline, rewards, prompts, settings.sampling)
    policy = _policy(settings, pipeline)
    trainer = Trainer(pipeline, policy, rewards, prompts, settings.recipe, settings.training, settings.sampling)
    if settings.hacking.on_alarm.raise_kl is not None:
        anchored(settings.recipe.objective, settings.hacking.on_alarm.raise_kl)
    guard = _guard(settings, pipeline, policy)
    folder.begin(plain)
    tested = _before_after(outside, settings, pipeline, rewards)
    before = tested.take(pipeline, folder.path / "before") if tested else None
    finished = train(
        trainer,
        folder,
        pipeline,
        _watcher(outside, settings, pipeline, policy),
        settings.held_out.every,
        trackers(settings.trackers, folder.path),
        guard,
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


def _policy(settings: config.Train, pipeline: Checkpoint) -> Policy:
    """What is trained, starting from a published adapter where one is named."""
    if settings.init_lora is not None:
        pipeline.load_lora(settings.init_lora)
    worn = settings.init_lora is not None
    return Policy(pipeline.denoiser, settings.lora, settings.averaging, settings.training.seed, worn)


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for one that is not installed: accelerate would leave it out."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"trackers names {name}, which is not installed: pip install {name}")


def trackers(names: Sequence[str], folder: Path) -> list[Any]:
    """Experiment trackers, through accelerate."""
    if not names:
        return []
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    accelerator.init_trackers("genalign")
    return list(accelerator.trackers)


def _probe(pipeline: Checkpoint, rewards: Sequence[NamedReward], prompts: PromptSet, sampling: Sampling) -> None:
    """Two images of the untrained model through every reward, before anything is written."""
    chosen = prompts.prompts[:2]
    texts = [prompt.text for prompt in chosen]
    images = next(generate(pipeline, texts, [0] * len(texts), sampling.grid(pipeline), sampling.guidance, len(texts)))
    probe(rewards, images, chosen)


def _before_after(
    outside: Outside, settings: config.Train, pipeline: Checkpoint, rewards: Sequence[NamedReward]
) -> Exam | None:
    chosen = settings.before_after
    if chosen is None:
        return None
    scorers = outside.judges(chosen.prompts, {reward.name: reward for reward in rewards})
    sampling = settings.evaluation or settings.sampling
    return exam(pipeline, settings.model, sampling, chosen, prompt_set(chosen.prompts), scorers)


def _watcher(
    outside: Outside, settings: config.Train, pipeline: Checkpoint, policy: Policy
) -> Callable[[], dict[str, Estimate]] | None:
    chosen = settings.held_out
    if not chosen.every:
        return None
    sampling = settings.evaluation or settings.sampling
    scorers = outside.judges(chosen.prompts, chosen.scorers)
    watched = exam(pipeline, settings.model, sampling, chosen, prompt_set(chosen.prompts), scorers)

    def watch() -> dict[str, Estimate]:
        with policy.averaged():
            return watched.take(pipeline).overall

    return watch


def _guard(settings: config.Train, pipeline: Checkpoint, policy: Policy) -> Guard | None:
    chosen = settings.hacking
    if not chosen.every:
        return None
    sampling = settings.evaluation or settings.sampling
    grid = sampling.grid(pipeline)
    jobs = plan(prompt_set(chosen.prompts), chosen.images_per_task, chosen.seeds)
    prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    texts = [prompt.text for prompt in prompts]
    measures = Measures(chosen.rewards, chosen.features, chosen.shown)

    def look() -> Looks:
        with policy.averaged():
            made = list(generate(pipeline, texts, seeds, grid, sampling.guidance, chosen.batch_size))
        return measures(torch.cat(made), prompts)

    return Guard(look, tuple(chosen.rewards), chosen.limits, chosen.on_alarm, chosen.every)


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


def demo_command(outside: Outside, arguments: Sequence[str]) -> int:
    """``genalign demo``: Flow-GRPO on the embedded shapes model, with the shipped configuration."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    shipped = str(files("genalign.assets").joinpath("demo.yaml"))
    return train_command(outside, ["--config", shipped, *arguments])
