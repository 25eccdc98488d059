"""Samples of the model before training, for rewards that are measured or learned on them, and their identity."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from genalign.cli.context import Checkpoint, CommandContext, load_with_lora, require_rate
from genalign.cli.generation_settings import RewardChoice
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import Train
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import SeededSamples
from genalign.diffusion.transitions import ODE
from genalign.evaluation.folder import adapter_hash
from genalign.runtime.distributed import ProcessGroup
from genalign.scoring.descriptions import describe
from genalign.scoring.reference_scores import ReferencedReward, ReferenceScores
from genalign.scoring.score import parts
from genalign.training.pools import PoolInfo
from genalign.types import Prompt

logger = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 64  # that are encoded and held at once


def base_model(context: CommandContext, settings: Train) -> Checkpoint:
    """Load the model that a run starts from."""
    pipeline = load_with_lora(context, settings.model, settings.init_lora)
    require_rate(settings, pipeline.sample_rate)
    pipeline.encode_ahead(RunPrompts.read(settings).texts())
    return pipeline


def base_samples(pipeline: Checkpoint, settings: Train, count: int) -> Iterator[tuple[Tensor, list[Prompt]]]:
    """Yield batches of samples (B, ...) of every prompt of a run and its evaluations, with their prompts.

    They are sampled with the settings and the seed of the training samples, without the recipe's kernel.

    Args:
        pipeline: The model before training.
        settings: The settings of the run.
        count: The number of samples of each prompt.
    """
    run_prompts, seed = RunPrompts.read(settings), settings.training.seed
    sets = (run_prompts.training, *run_prompts.evaluations.values())
    prompts = list({prompt.text: prompt for one in reversed(sets) for prompt in one.prompts}.values())
    size = settings.training.fit(run_prompts.training, settings.recipe.objective.unit).batch_size
    grid, guidance = settings.sampling.grid(pipeline), settings.sampling.guidance_scale(pipeline)
    for first in range(0, len(prompts), _TEXTS_AT_ONCE):
        chunk = [(prompt, number) for prompt in prompts[first : first + _TEXTS_AT_ONCE] for number in range(count)]
        texts = [prompt.text for prompt, _ in chunk]
        seeds = [derived_seed(seed, "base samples", prompt.text, number) for prompt, number in chunk]
        source = SeededSamples(pipeline, texts, seeds, grid, guidance, size, settings.sampling.kernel_on(grid))
        for number in range(len(source)):
            yield source.batch(number), [prompt for prompt, _ in chunk[number * size : (number + 1) * size]]


def base_identity(pipeline: Checkpoint, settings: Train) -> dict[str, Any]:
    """Identify the model that a run starts from, and how it is sampled, in JSON types."""
    kernel = settings.sampling.kernel
    return {
        "model": settings.model.path,
        "fingerprint": pipeline.fingerprint,
        "adapter": adapter_hash(Path(settings.init_lora)) if settings.init_lora else None,
        "resolution": list(pipeline.resolution),
        "steps": settings.sampling.num_steps,
        "guidance": float(settings.sampling.guidance_scale(pipeline)),
    } | ({"kernel": repr(kernel)} if kernel not in (None, ODE()) else {})


def require_references(settings: Train) -> None:
    """Raise an error if a file of reference scores is missing, or of another reward or prompt set than the run's."""
    for path, reward in _files(settings.rewards):
        stored = ReferenceScores.load(path)
        stored.by(describe(reward.reward), path)
        stored.require_prompts(RunPrompts.read(settings).texts(), path)


def require_base(pipeline: Checkpoint, settings: Train) -> None:
    """Raise ValueError if a file of reference scores is of another model than the run starts from."""
    for path, _ in _files(settings.rewards):
        ReferenceScores.load(path).require_base(base_identity(pipeline, settings), path)


def warn_of_other_base(pipeline: Checkpoint, settings: Train, processes: ProcessGroup) -> None:
    """Log a warning, on the main rank, if another model than the run starts from made the samples of its pool."""
    folder = settings.training.data
    denoiser = PoolInfo.read(Path(folder)).denoiser if folder else None
    if processes.is_main and denoiser not in (None, pipeline.fingerprint):
        logger.warning(
            "the samples of %s were made by another base model (weights %s, not %s): a recipe that assumes samples of"
            " the model itself is off-policy on them",
            *(folder, denoiser, pipeline.fingerprint),
        )


def _files(rewards: Mapping[str, RewardChoice]) -> Iterator[tuple[str, ReferencedReward]]:
    """Yield the files of reference scores of a configuration, and the rewards that read them."""
    for _, part in parts(rewards):
        if isinstance(part, ReferencedReward) and part.reference_file is not None:
            yield part.reference_file, part


def referenced(choice: RewardChoice) -> list[ReferencedReward]:
    """List the rewards within a reward that read a file of reference scores."""
    return [reward for _, reward in _files({"": choice})]
