"""The code that commands share: the interface to pipelines and rewards, and building them from a configuration."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table
from torch import nn

from genalign.cli.evaluate_settings import EvaluationSize
from genalign.cli.generation_settings import RewardChoice
from genalign.cli.model_settings import Model
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, suite_hash
from genalign.evaluation.folder import ModelIdentity, adapter_hash
from genalign.evaluation.geneval.judge import Judge
from genalign.evaluation.scorers import Scorer
from genalign.runtime.distributed import RankShare, take_own_device
from genalign.runtime.fsdp import sharding_from_environment
from genalign.runtime.progress import Progress
from genalign.runtime.prompt_files import load_prompts
from genalign.scoring.score import NamedReward, parts
from genalign.search.noise_aware import NoiseAware
from genalign.training.outline import Outline
from genalign.training.pools import INFO, Pool
from genalign.training.run_folder import WeightStore
from genalign.types import EncodesSamples, Pipeline, PromptSet
from genalign.worlds.registry import world_of


class Checkpoint(Pipeline, WeightStore, EncodesSamples, Protocol):
    """A pipeline loaded from a folder or the Hub, with the adapters of its family."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample: (3, H, W) of images, (channels, L) of audio."""

    @property
    def resolution(self) -> tuple[int, ...]:
        """Height and width of the images in pixels, or the length of the audio in samples."""

    @property
    def sample_rate(self) -> int | None:
        """Audio samples per second; None for images."""

    @property
    def fingerprint(self) -> str:
        """A hash of the denoiser's weights in the checkpoint, without an adapter."""

    @property
    def encoded(self) -> list[list[str]]:
        """The batches in which texts were encoded so far."""

    def encode_ahead(
        self,
        texts: Iterable[str],
        share: RankShare = ...,
        wait: Callable[[], None] = ...,
        progress: Progress = ...,
    ) -> None:
        """Encode all texts of a command into the text cache, and drop the text encoders; no-op without a cache."""

    def encode_together(self, batches: Sequence[Sequence[str]]) -> None:
        """Encode each of these batches as one when any text of it is needed."""

    def separate_encoding(self) -> AbstractContextManager[None]:
        """Encode texts within the context without affecting the batches in which texts are encoded later."""

    def load_lora(self, source: str | Path) -> None:
        """Load an adapter from a folder, a file or the Hub."""

    def compile_blocks(self, batch_sizes: Sequence[int] = ()) -> None:
        """Compile the denoiser, with the adapter that is on, if its settings say so."""

    def load_denoiser(self, directory: Path) -> None:
        """Load the weights that ``save_denoiser`` wrote."""

    def save_merged(self, directory: Path, whole: bool) -> None:
        """Write the network with the adapter merged into its weights, or the ``whole`` pipeline with that network."""


@dataclass(frozen=True)
class CommandContext:
    """The functions of ``pipelines`` and ``rewards``, which genalign does not import, for commands; from ``cli.main``.

    Args:
        load: Load a model.
        outline: Open a model without its weights.
        require: Raise ValueError for a model that this machine cannot run.
        scorers: Build the named scores of a world's verifier.
        save_scorer: Write a noise-aware reward to a file.
        geneval: Build the default judge of GenEval evaluations, which uses a detector.
        started: When the command began, in seconds of ``time.monotonic``, which starts a time budget.
    """

    load: Callable[[Model], Checkpoint]
    outline: Callable[[Model], Outline]
    require: Callable[[Model], None]
    scorers: Callable[[str], Mapping[str, Scorer]]
    save_scorer: Callable[[Path, NoiseAware, nn.Module], None]
    geneval: Callable[[], Judge]
    started: float = field(default_factory=time.monotonic)

    def scorers_for(self, source: str, others: Mapping[str, Scorer]) -> Mapping[str, Scorer]:
        """Join the verifier's scores, if the prompts of ``source`` are a world's, with ``others`` of other names."""
        world = world_of(source)
        own = self.scorers(world.name) if world else {}
        return {**own, **{name: scorer for name, scorer in others.items() if name not in own}}


def require_rate(settings: object, rate: int | None) -> None:
    """Raise ValueError if anything in ``settings``, at any depth, assumes a sample rate other than ``rate``.

    ``rate`` is in Hz; None, for images, fits everything.
    """
    for place, part in parts(settings) if rate is not None else ():
        assumed = getattr(part, "sample_rate", None)  # of a reward or an encoder; None if it takes no audio
        if assumed is not None and assumed != rate:
            raise ValueError(
                f"{place} expects waveforms at {assumed} Hz, but gets {rate} Hz: set its sample_rate to {rate}, or use"
                " samples at its rate"
            )


def load_with_lora(context: CommandContext, model: Model, lora: str | None) -> Checkpoint:
    """Load a model and, if there is one, its adapter, and compile the model if its settings say so."""
    pipeline = context.load(model)
    if lora:
        pipeline.load_lora(lora)
    pipeline.compile_blocks()
    return pipeline


def load_with_identity(
    context: CommandContext, model: Model, lora: str | None, plain: Mapping[str, object]
) -> tuple[Checkpoint, ModelIdentity]:
    """Load a model with its adapter, and identify both for the record of an evaluation.

    Args:
        context: The pipelines and rewards.
        model: The model's settings.
        lora: The adapter; None for none.
        plain: The model's settings as plain JSON.

    Returns:
        The pipeline, and the settings and hashes that identify it on any device.
    """
    lora_hash = adapter_hash(Path(lora)) if lora else None
    pipeline = load_with_lora(context, model, lora)
    settings = {name: value for name, value in plain.items() if name not in ("device", "token", "text_cache")}
    return pipeline, ModelIdentity(settings, pipeline.fingerprint, lora, lora_hash)


def model_protocol(
    pipeline: Checkpoint,
    model: Model,
    sampling: Sampling,
    size: EvaluationSize,
    prompts: PromptSet,
    verifier: str,
) -> EvaluationProtocol:
    """Describe the evaluation of a model.

    Args:
        pipeline: The loaded model.
        model: Its settings.
        sampling: Steps, guidance and kernel.
        size: The number of samples per task and of noises per prompt, and the batch size.
        prompts: The prompts.
        verifier: A description of everything that scores the samples.
    """
    assert size.batch_size is not None, "it is that of the training samples by now"
    grid = sampling.grid(pipeline)
    return EvaluationProtocol(
        suite=prompts.name,
        suite_hash=suite_hash(prompts),
        guidance=sampling.guidance_scale(pipeline),
        sigmas=tuple(grid.sigma.tolist()),
        kernel=repr(sampling.kernel_on(grid)),
        dtype=model.autocast or model.dtype,
        batch_size=size.batch_size,
        resolution=pipeline.resolution,
        seeds=size.seeds,
        samples_per_task=size.samples_per_task,
        verifier=verifier,
        negative_prompt=model.negative_prompt,
    )


def print_estimates(evaluation: Evaluation) -> None:
    """Print every score, of each task if there are several, and overall, with its interval."""
    tasks = evaluation.tasks if len(evaluation.tasks) > 1 else {}
    for task, estimates in (tasks | {"overall": evaluation.overall}).items():
        values = (f"{name} {value.text('.3f')}" for name, value in estimates.items())
        print(f"{task:14s}" + "  ".join(values))


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table with a row of titles."""
    table = Table(*titles, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def rank_share() -> RankShare:
    """Read this process's share of the work from the launcher's variables, and select its GPU.

    Raises ValueError if the launcher would shard the network with FSDP, which only training supports.
    """
    share = RankShare.from_environment(os.environ)
    if sharding_from_environment(os.environ, share.world_size):
        raise ValueError("FSDP is supported only for training: launch this command without FSDP, as in ddp.yaml")
    take_own_device(os.environ)
    return share


def named_rewards(choices: Mapping[str, RewardChoice]) -> list[NamedReward]:
    """Build the rewards of a configuration."""
    return [
        NamedReward(name, choice.function, choice.weight, choice.score_batch, choice.timeout)
        for name, choice in choices.items()
    ]


def prompt_set(source: str) -> PromptSet:
    """Read a split of a world (shapes:train), some of its tasks (shapes:train:counting), a file, dataset or pool."""
    if (Path(source) / INFO).is_file():
        return Pool.load(Path(source)).prompts
    world, rest = world_of(source), source.split(":")[1:]
    if world is None or len(rest) > 2:
        return load_prompts(source)
    prompts = world.prompts(rest[0])
    return prompts if len(rest) == 1 else prompts.of_tasks(rest[1].split(","))
