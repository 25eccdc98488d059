"""``genalign evaluate``, and the evaluations before, during and after training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from genalign.cli import config, parsing
from genalign.cli.context import (
    Checkpoint,
    CommandContext,
    load_with_identity,
    model_protocol,
    print_estimates,
    prompt_set,
    rank_share,
)
from genalign.cli.evaluate_geneval import compare_geneval_command, geneval_command, images_command, original_command
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import Evaluation, evaluate, evaluate_files, plan_samples
from genalign.evaluation.folder import BatchFolder, manifest
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from genalign.runtime.media import inside, writer
from genalign.runtime.prompt_files import read_listing
from genalign.types import RewardFunction
from genalign.worlds.registry import WORLDS, World, world_of


def build_evaluator(
    pipeline: Checkpoint,
    model: config.Model,
    sampling: Sampling,
    size: config.EvaluationSize,
    source: str,
    scorers: Mapping[str, RewardFunction],
    processes: ProcessGroup = SINGLE_PROCESS,
) -> partial[Evaluation]:
    """Bind ``evaluate`` to a model and to prompts, noises, scorers and a protocol, as before and after training.

    Args:
        pipeline: The loaded model.
        model: Its settings.
        sampling: Steps and guidance.
        size: How many samples per task and noises per prompt, and the batch size.
        source: The prompts: a split of a world or a prompt file.
        scorers: Functions that score the samples, by name.
        processes: Ranks that share the samples.

    Raises:
        ValueError: the prompts are of a world whose verifier takes another medium than this model generates.
    """
    prompts, world = prompt_set(source), world_of(source)
    if world and world.sample_rate != pipeline.sample_rate:
        rates = world.sample_rate, pipeline.sample_rate
        expected, actual = ("images" if rate is None else f"waveforms at {rate} Hz" for rate in rates)
        raise ValueError(
            f"the verifier of {source!r} takes {expected}, but this model makes {actual}: choose other prompts"
        )
    protocol = model_protocol(pipeline, model, sampling, size, prompts, world.verifier if world else "none")
    specs, write = plan_samples(prompts, size.samples_per_task, size.seeds), writer(pipeline.sample_rate)
    return partial(evaluate, pipeline, specs, scorers, protocol=protocol, write=write, processes=processes)


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
    """Evaluate the samples of a model, or those in a folder that another program filled, on a world's prompts."""
    settings, plain = parsing.parse(kind, arguments, f"evaluate {world.name}")
    output, scorers = Path(settings.output), context.scorers[world.name]
    if settings.samples is not None:
        samples = Path(settings.samples)
        files = {name: world.prompt(prompt.text) for name, prompt in read_listing(samples).items()}
        evaluation = evaluate_files(
            files, lambda name: world.read(inside(samples, name)), scorers, samples.name, world.verifier
        )
        evaluation.save(output)
        print_estimates(evaluation)
        return 0

    rank_share()
    with process_group(os.environ) as processes:
        pipeline, identity = load_with_identity(context, settings.model, settings.lora, plain["model"])
        source = f"{world.name}:{settings.suite}"
        evaluator = build_evaluator(pipeline, settings.model, settings.sampling, settings, source, scorers, processes)
        folder = BatchFolder(output)
        folder.begin(manifest(evaluator.keywords["protocol"], identity))
        evaluation = evaluator(output=output, batches=folder)
        if processes.is_main:
            print_estimates(evaluation)
    return 0
