"""What a training configuration will hold in memory, and which other settings would hold less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from genalign.cli import config
from genalign.cli.context import CommandContext, named_rewards, prompt_set
from genalign.diffusion.policy import Policy
from genalign.training.dry_run import Counted, Levels, count
from genalign.training.memory_estimate import Held, Outline, Part, Training, adapter_numbers, held
from genalign.types import PromptSet

_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are, the networks, and how many numbers are ``trained``."""

    held: Held
    parts: tuple[Part, ...]
    trained: int

    @property
    def peak(self) -> float:
        """The most that is held at any time."""
        return max(self.held.peaks().values())


def counted(settings: config.Train, outline: Outline | None, prompts: PromptSet) -> Counted:
    """Every call of the run; without an ``outline`` on a grid of equal steps."""
    sampling = settings.sampling
    levels = Levels.straight(sampling.num_steps)
    if outline is not None:
        levels = Levels.of(outline.pipeline, sampling)
        outline.pipeline.require_guidance(sampling.guidance)
    rewards = named_rewards(settings.rewards)
    return count(levels, rewards, prompts, settings.recipe, settings.training, sampling.guidance)


def estimate(settings: config.Train, outline: Outline, stored: int) -> MemoryEstimate:
    """Of the settings that ``outline`` was opened with, which wears the adapter from then on; ``stored`` is that of
    ``Counted``. Raises ValueError for an adapter to begin with and none to train.
    """
    parts, source = tuple(outline.parts), settings.init_lora
    if source is not None and settings.lora is None:
        raise ValueError("init_lora needs lora: give it any, its rank and layers are the adapter's own")
    new = sum(p.numel() for p in Policy(outline.pipeline.denoiser, settings.lora, settings.ema_decay).parameters)
    trained = (adapter_numbers(Path(source)) if source else None) or new
    return MemoryEstimate(held(outline, parts, trained, _training(settings, stored)), parts, trained)


def _training(settings: config.Train, stored: int) -> Training:
    return Training(
        width=_WIDTHS[settings.model.dtype],
        memory=settings.model.memory,
        optimizer=settings.training.optimizer,
        lora=settings.lora is not None,
        lags=settings.recipe.lag is not None,
        guidance=settings.sampling.guidance,
        batch_size=settings.training.batch_size,
        images=settings.training.prompts_per_round * settings.training.group_size,
        stored=stored,
    )


def lighter(settings: config.Train) -> Iterator[tuple[str, config.Train]]:
    """Settings that hold less and train the same, each by the arguments that ask for it."""
    training, model = settings.training, settings.model
    if not model.memory.checkpointing:
        memory = replace(model.memory, checkpointing=True)
        yield "--model.memory.checkpointing true", replace(settings, model=replace(model, memory=memory))
    if not model.memory.offload:
        memory = replace(model.memory, offload=True)
        yield "--model.memory.offload true", replace(settings, model=replace(model, memory=memory))
    groups = training.prompts_per_round // training.updates_per_round
    sizes = [n * training.group_size for n in range(1, groups + 1) if groups % n == 0]
    if smaller := [size for size in sizes if size < training.batch_size]:
        less = replace(training, batch_size=smaller[-1])
        yield f"--training.batch_size {smaller[-1]}", replace(settings, training=less)


def reliefs(context: CommandContext, settings: config.Train, stored: int) -> Mapping[str, float]:
    """The peak in bytes with each of ``lighter``'s arguments."""
    return {
        arguments: estimate(other, context.outline(other.model), stored).peak for arguments, other in lighter(settings)
    }


def advice(context: CommandContext, settings: config.Train) -> str:
    """What to try where memory ran out, with the peaks that ``genalign plan`` estimates."""
    try:
        outline = context.outline(settings.model)
        stored = counted(settings, outline, prompt_set(settings.prompts)).stored
        here = gibibytes(estimate(settings, outline, stored).peak)
        found = [f"{name} ({gibibytes(peak)})" for name, peak in reliefs(context, settings, stored).items()]
    except (*config.REFUSED, RuntimeError):  # such as no memory for this, either
        here, found = "no estimate", [name for name, _ in lighter(settings)]
    tried = "; ".join([*found, "--training.on_out_of_memory halve"])
    return f"`genalign plan` puts these settings at {here}, without rewards; less is held with {tried}"


def gibibytes(size: float) -> str:
    """Bytes as text."""
    return f"{size / 2**30:,.3f} GiB"
