"""What several commands are made of: models, rewards and prompts by configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from genalign.cli import config
from genalign.evaluation.evaluate import Evaluation
from genalign.evaluation.folder import Subject, adapter_hash
from genalign.evaluation.geneval.judge import Judge
from genalign.runtime.distributed import RankShare, take_own_device
from genalign.runtime.fsdp import sharding_from_environment
from genalign.runtime.prompt_files import load_prompts
from genalign.scoring.score import NamedReward
from genalign.search.noise_aware import NoiseAware
from genalign.training.memory_estimate import Outline
from genalign.training.run import WeightStore
from genalign.types import Pipeline, PromptSet, RewardFunction
from genalign.worlds.registry import world_of


class Checkpoint(Pipeline, WeightStore, Protocol):
    """A pipeline that was opened from a folder or the Hub, and knows the adapters of its family."""

    @property
    def resolution(self) -> tuple[int, ...]:
        """Height and width of its images in pixels, or the length of its audio."""

    @property
    def sample_rate(self) -> int | None:
        """Audio samples a second; None for images."""

    @property
    def fingerprint(self) -> str:
        """A hash of the denoiser's weights as they were opened, without an adapter."""

    @property
    def encoded(self) -> list[list[str]]:
        """The batches in which texts were encoded so far."""

    def encode_together(self, batches: Sequence[Sequence[str]]) -> None:
        """Once one of these texts is needed, encode it in its batch."""

    def separate_encoding(self) -> AbstractContextManager[None]:
        """Encode texts, within the context, without an effect on the batches in which texts are encoded later."""

    def load_lora(self, source: str | Path) -> None:
        """Put on an adapter, from a folder, a file or the Hub."""

    def load_denoiser(self, directory: Path) -> None:
        """Take the weights that ``save_denoiser`` wrote."""

    def save_merged(self, directory: Path, whole: bool) -> None:
        """Write the network with its adapter in its weights; ``whole``: the pipeline around it, too."""


@dataclass(frozen=True)
class CommandContext:
    """What commands need of ``pipelines`` and ``rewards``, which genalign does not import; filled by ``cli.main``.

    ``load`` opens a model, ``outline`` one without weights, and ``require`` raises ValueError where this machine cannot
    run it. ``scorers`` are the verifier's scores of each world, ``save_scorer`` writes a noise-aware reward, and
    ``geneval`` is the detector-based judge of GenEval evaluations that name no other.
    """

    load: Callable[[config.Model], Checkpoint]
    outline: Callable[[config.Model], Outline]
    require: Callable[[config.Model], None]
    scorers: Mapping[str, Mapping[str, RewardFunction]]
    save_scorer: Callable[[Path, NoiseAware], None]
    geneval: Judge

    def judges(self, source: str, others: Mapping[str, RewardFunction]) -> Mapping[str, RewardFunction]:
        """The verifier's scores for prompts of a world, and the ``others`` that have other names."""
        world = world_of(source)
        own = self.scorers[world.name] if world else {}
        return {**own, **{name: scorer for name, scorer in others.items() if name not in own}}


@runtime_checkable
class AtRate(Protocol):
    """A reward, or a part of one, that is told at what rate waveforms come, and does not hear it."""

    @property
    def sample_rate(self) -> int | None:
        """Samples a second; None where it hears none."""


def require_rate(settings: object, rate: int | None) -> None:
    """Raise ValueError where something in ``settings``, at any depth, hears another rate than that of the samples,
    which is None for images.
    """
    for place, heard in _rates(settings, "") if rate is not None else ():
        if heard != rate:
            raise ValueError(
                f"{place} takes waveforms at {heard} Hz, but they come at {rate}: set its sample_rate to {rate}, or"
                " take samples of its rate"
            )


def _rates(part: object, place: str) -> Iterator[tuple[str, int]]:
    """The rates that a part of a configuration and its own parts hear, with their places in it."""
    if isinstance(part, AtRate) and part.sample_rate is not None:
        yield place, part.sample_rate
    for name, inner in _inside(part):
        yield from _rates(inner, f"{place}.{name}" if place else name)


def _inside(part: object) -> Iterable[tuple[str, object]]:
    if isinstance(part, Mapping):
        return part.items()
    if isinstance(part, list | tuple):
        return ((str(number), inner) for number, inner in enumerate(part))
    return vars(part).items() if is_dataclass(part) and not isinstance(part, type) else ()


def adapted(context: CommandContext, model: config.Model, lora: str | None) -> Checkpoint:
    """A model with its adapter."""
    pipeline = context.load(model)
    if lora:
        pipeline.load_lora(lora)
    return pipeline


def opened(
    context: CommandContext, model: config.Model, lora: str | None, plain: Mapping[str, object]
) -> tuple[Checkpoint, Subject]:
    """A model with its adapter, and what an evaluation of it is of; ``plain`` are the model's settings as written."""
    lora_hash = adapter_hash(Path(lora)) if lora else None
    pipeline = adapted(context, model, lora)
    shown = {name: value for name, value in plain.items() if name != "device"}
    return pipeline, Subject(shown, pipeline.fingerprint, lora, lora_hash)


def print_estimates(evaluation: Evaluation) -> None:
    """Every score of every task, and overall, with its interval."""
    for task, estimates in (evaluation.tasks | {"overall": evaluation.overall}).items():
        values = (f"{name} {value.mean:.3f} ({value.low:.3f} to {value.high:.3f})" for name, value in estimates.items())
        print(f"{task:14s}" + "  ".join(values))


def import_from_here() -> None:
    """Let a configuration name modules of the working directory; installed ones of the same name come first."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def own_share(variables: Mapping[str, str]) -> RankShare:
    """This process's share of work without training, by what a launcher set, and on its own GPU. Raises ValueError
    where the launcher was told to divide the network.
    """
    share = RankShare.from_environment(variables)
    if sharding_from_environment(variables, share.world_size):
        raise ValueError("FSDP divides a network while it is trained: launch this without it, with copies")
    take_own_device(variables)
    return share


def named_rewards(chosen: Mapping[str, config.RewardChoice]) -> list[NamedReward]:
    """The rewards of a configuration."""
    return [
        NamedReward(name, choice.function, choice.weight, choice.score_batch, choice.timeout)
        for name, choice in chosen.items()
    ]


def prompt_set(source: str) -> PromptSet:
    """A split of a world, as in "shapes:train", some of its tasks, as in "shapes:train:counting,colors", or a prompt
    file.
    """
    world, rest = world_of(source), source.split(":")[1:]
    if world is None or len(rest) > 2:
        return load_prompts(Path(source))
    found = world.prompts(rest[0])
    return found if len(rest) == 1 else found.of_tasks(rest[1].split(","))
