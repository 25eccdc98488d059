"""``genalign evaluate``, and the exams that training sits before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genalign import config
from genalign.commands.geneval import compare_geneval_command, geneval_command, images_command, original_command
from genalign.commands.parts import Checkpoint, Outside
from genalign.evaluation import Evaluation, Job, Protocol, evaluate, plan, suite_hash
from genalign.media import Writer, writer
from genalign.processes import ALONE, Processes, joined
from genalign.sampling import Sampling
from genalign.types import Pipeline, PromptSet, RewardFunction
from genalign.worlds import shapes


@dataclass(frozen=True)
class Exam:
    """What is to be made and scored, and how."""

    jobs: tuple[Job, ...]
    scorers: Mapping[str, RewardFunction]
    protocol: Protocol
    write: Writer
    processes: Processes = ALONE

    def take(self, pipeline: Pipeline, output: Path | None = None) -> Evaluation:
        """Evaluate the pipeline as it is now."""
        return evaluate(
            pipeline, self.jobs, self.scorers, self.protocol, output, write=self.write, processes=self.processes
        )


def exam(
    pipeline: Checkpoint,
    model: config.Model,
    sampling: Sampling,
    amount: config.Amount,
    prompts: PromptSet,
    scorers: Mapping[str, RewardFunction],
    processes: Processes = ALONE,
) -> Exam:
    """``amount`` of images of ``prompts``, a share of them for each of the ``processes``."""
    protocol = Protocol(
        suite=prompts.name,
        suite_hash=suite_hash(prompts),
        guidance=sampling.guidance,
        sigmas=tuple(sampling.grid(pipeline).sigma.tolist()),
        kernel="ODE()",
        dtype=model.autocast or model.dtype,
        batch_size=amount.batch_size,
        resolution=pipeline.resolution,
        seeds=amount.seeds,
        images_per_task=amount.images_per_task,
        verifier=shapes.VERIFIER_VERSION,
    )
    jobs = plan(prompts, amount.images_per_task, amount.seeds)
    return Exam(jobs, scorers, protocol, writer(pipeline.sample_rate), processes)


def evaluate_command(outside: Outside, arguments: Sequence[str]) -> int:
    """``genalign evaluate shapes | geneval | geneval-images | geneval-original | geneval-compare``."""
    match arguments:
        case ["geneval", *rest]:
            return geneval_command(outside, rest)
        case ["geneval-images", *rest]:
            return images_command(outside, rest)
        case ["geneval-compare", *rest]:
            return compare_geneval_command(rest)
        case ["geneval-original", *rest]:
            return original_command(rest)
        case ["shapes", *_]:
            return _evaluate_shapes(outside, arguments)
    raise ValueError("name the world: genalign evaluate shapes --output DIR, or genalign evaluate geneval")


def _evaluate_shapes(outside: Outside, arguments: Sequence[str]) -> int:
    settings, _ = config.parse(config.EvaluateShapes, arguments[1:], "evaluate shapes")
    with joined(os.environ) as processes:
        return _in_processes(outside, settings, processes)


def _in_processes(outside: Outside, settings: config.EvaluateShapes, processes: Processes) -> int:
    pipeline = outside.load(settings.model)
    if settings.lora:
        pipeline.load_lora(settings.lora)
    prompts = shapes.prompts(settings.suite)
    asked = exam(pipeline, settings.model, settings.sampling, settings, prompts, outside.scorers, processes)
    made = asked.take(pipeline, Path(settings.output))
    for task, estimates in (made.tasks | {"overall": made.overall}).items() if processes.first else ():
        print(f"{task:14s}" + "  ".join(f"{name} {value.mean:.3f}" for name, value in estimates.items()))
    return 0
