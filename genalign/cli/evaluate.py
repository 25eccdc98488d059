"""``genalign evaluate``, and the exams that training sits before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genalign.cli import config
from genalign.cli.context import Checkpoint, CommandContext, opened, own_share, print_estimates, prompt_set
from genalign.cli.evaluate_geneval import compare_geneval_command, geneval_command, images_command, original_command
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import Evaluation, Job, Kept, Protocol, evaluate, judge, plan, suite_hash
from genalign.evaluation.folder import BatchFolder, manifest
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from genalign.runtime.media import Writer, inside, writer
from genalign.runtime.prompt_files import read_listing
from genalign.types import Pipeline, RewardFunction
from genalign.worlds.registry import WORLDS, World, world_of


@dataclass(frozen=True)
class Exam:
    """What is to be made and scored, and how."""

    jobs: tuple[Job, ...]
    scorers: Mapping[str, RewardFunction]
    protocol: Protocol
    write: Writer
    processes: ProcessGroup = SINGLE_PROCESS

    def take(self, pipeline: Pipeline, output: Path | None = None, kept: Kept | None = None) -> Evaluation:
        """Evaluate the pipeline as it is now, but for the batches that are ``kept``."""
        return evaluate(
            pipeline,
            self.jobs,
            self.scorers,
            self.protocol,
            output,
            write=self.write,
            processes=self.processes,
            kept=kept,
        )


def exam(
    pipeline: Checkpoint,
    model: config.Model,
    sampling: Sampling,
    amount: config.Amount,
    source: str,
    scorers: Mapping[str, RewardFunction],
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Exam:
    """``amount`` of samples of the prompts that ``source`` names, a share of them for each of the ``processes``.

    Raises ValueError where the prompts are of a world whose verifier takes other samples than this model's.
    """
    prompts, world = prompt_set(source), world_of(source)
    if world and world.sample_rate != pipeline.sample_rate:
        taken, made = _medium(world.sample_rate), _medium(pipeline.sample_rate)
        raise ValueError(f"the verifier of {source!r} takes {taken}, but this model makes {made}: choose other prompts")
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
        samples_per_task=amount.samples_per_task,
        verifier=world.verifier if world else "none",
    )
    jobs = plan(prompts, amount.samples_per_task, amount.seeds)
    return Exam(jobs, scorers, protocol, writer(pipeline.sample_rate), processes)


def _medium(sample_rate: int | None) -> str:
    return "images" if sample_rate is None else f"waveforms at {sample_rate} Hz"


def evaluate_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign evaluate shapes | tones | geneval | geneval-images | geneval-original | geneval-compare``."""
    match arguments:
        case ["geneval", *rest]:
            return geneval_command(context, rest)
        case ["geneval-images", *rest]:
            return images_command(context, rest)
        case ["geneval-compare", *rest]:
            return compare_geneval_command(rest)
        case ["geneval-original", *rest]:
            return original_command(rest)
        case ["shapes", *rest]:
            return _evaluate_world(context, WORLDS["shapes"], config.EvaluateShapes, rest)
        case ["tones", *rest]:
            return _evaluate_world(context, WORLDS["tones"], config.EvaluateTones, rest)
    raise ValueError("name the world: genalign evaluate shapes --output DIR, or genalign evaluate tones, or geneval")


def _evaluate_world(
    context: CommandContext, world: World, kind: type[config.EvaluateShapes], arguments: Sequence[str]
) -> int:
    settings, plain = config.parse(kind, arguments, f"evaluate {world.name}")
    if settings.samples is None:
        own_share(os.environ)
        with process_group(os.environ) as processes:
            made = _in_processes(context, world, settings, plain["model"], processes)
            if processes.is_main:
                print_estimates(made)
        return 0
    made = _of_folder(world, Path(settings.samples), context.scorers[world.name])
    made.save(Path(settings.output))
    print_estimates(made)
    return 0


def _in_processes(
    context: CommandContext,
    world: World,
    settings: config.EvaluateShapes,
    plain: Mapping[str, object],
    processes: ProcessGroup,
) -> Evaluation:
    pipeline, subject = opened(context, settings.model, settings.lora, plain)
    source = f"{world.name}:{settings.suite}"
    scorers = context.scorers[world.name]
    asked = exam(pipeline, settings.model, settings.sampling, settings, source, scorers, processes)
    folder = BatchFolder(Path(settings.output))
    folder.begin(manifest(asked.protocol, subject))
    return asked.take(pipeline, folder.path, folder)


def _of_folder(world: World, folder: Path, scorers: Mapping[str, RewardFunction]) -> Evaluation:
    """The samples of a folder that another program filled; their prompts are the world's own, metadata and all."""
    files = {name: world.prompt(prompt.text) for name, prompt in read_listing(folder).items()}
    return judge(files, lambda name: world.read(inside(folder, name)), scorers, folder.name, world.verifier)
