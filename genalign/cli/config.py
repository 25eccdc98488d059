"""Typed configuration of a run, its parser, and messages that say what to write instead."""

from __future__ import annotations

import inspect
import json
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from torch import nn

from genalign.algorithms.recipes import Recipe, flow_grpo
from genalign.cli.error_messages import explain
from genalign.diffusion.policy import Lora
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import Kernel
from genalign.runtime.media import AudioFormat
from genalign.runtime.memory_options import Memory
from genalign.scoring.budget import Budget
from genalign.scoring.score import RewardError
from genalign.search.noise_aware import Distillation
from genalign.search.strategy import Strategy
from genalign.training.checkpointing import Checkpointing
from genalign.training.noise_calibration import Calibration
from genalign.training.nonfinite import DivergedError
from genalign.training.reward_hacking import Actions, Limits
from genalign.training.sample_grid import SampleGrid
from genalign.training.trainer import TrainerSettings
from genalign.types import AnyCallable

set_parsing_settings(subclasses_enabled=[Recipe, Kernel], instantiate_subclass_spec_in_any=False)

Precision = Literal["float32", "bfloat16", "float16"]
LINEAR_TEN = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Model:
    """A checkpoint: an embedded one by name, a diffusers folder, or a Hub id. ``autocast`` is mixed precision.

    ``compiled``: the denoiser runs by torch.compile, which takes minutes at the start and for every new batch size;
    sampling and training then round differently, so that the first log-ratios are not exactly 0.
    """

    path: str = "shapes-sd3"
    dtype: Precision = "float32"
    autocast: Precision | None = None
    device: str = "cpu"
    height: int | None = None
    width: int | None = None
    seconds: float | None = None
    max_sequence_length: int | None = None
    distilled_guidance: float | None = None
    compiled: bool = False
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True)
class RewardChoice:
    """A function or callable class by its import path, and its weight in the sum; weight 0 only reports.

    ``score_batch``: how many samples are scored at once, for large networks; None for all that are asked for.
    ``timeout``: seconds after which a call has failed; None for never.
    """

    function: AnyCallable
    weight: float = 1.0
    score_batch: int | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Amount:
    """How many images of each task, from at least ``seeds`` noises of each prompt."""

    samples_per_task: int = 96
    seeds: int = 3
    batch_size: int = 96

    def __post_init__(self) -> None:
        _require_positive(self, "samples_per_task", "seeds", "batch_size")


@dataclass(frozen=True)
class HeldOut(Amount):
    """What is watched while training: ``scorers`` on ``prompts`` every ``every`` rounds, 0 for never."""

    samples_per_task: int = 32
    seeds: int = 1
    prompts: str = "shapes:val"
    every: int = 10
    scorers: dict[str, AnyCallable] = field(default_factory=dict)


@dataclass(frozen=True)
class BeforeAfter(Amount):
    """Prompts evaluated before and after training with the same noises."""

    prompts: str = "shapes:comp"


@dataclass(frozen=True)
class Hacking(Amount):
    """The monitor of reward hacking, every ``every`` rounds, 0 for never: see ``genalign.training.reward_hacking``.

    ``rewards`` are not trained on; ``features`` give variety and drift; ``diagnostics`` are functions of a set of
    samples and their prompts that are only reported.
    """

    samples_per_task: int = 16
    seeds: int = 2
    prompts: str = "shapes:val"
    every: int = 0
    rewards: dict[str, AnyCallable] = field(default_factory=dict)
    features: AnyCallable | None = None
    diagnostics: dict[str, AnyCallable] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    on_red: Actions = field(default_factory=Actions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 2 or self.samples_per_task < 2:
            raise ValueError(
                "reward_hacking.seeds and reward_hacking.samples_per_task must be at least 2, to tell variety"
            )


@dataclass(frozen=True)
class Train:
    """One training run. ``prompts`` is a world's split such as "shapes:train", or a .txt or .jsonl file; ``evaluation``
    is how held-out images are sampled, where that differs from ``sampling``. ``init_lora`` is an adapter, with its own
    rank and layers, that is trained on instead of a new one. `genalign train --resume RUN` goes on with the run in that
    folder, and `--resume` alone with the one in ``output``, where there is one.
    """

    output: str
    rewards: dict[str, RewardChoice] = field(default_factory=dict, kw_only=True)
    recipe: Recipe
    model: Model = field(default_factory=Model)
    prompts: str = "shapes:train"
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Sampling | None = None
    training: TrainerSettings = field(default_factory=TrainerSettings)
    lora: Lora | None = field(default_factory=Lora)
    init_lora: str | None = None
    ema_decay: float = 0.9
    held_out: HeldOut = field(default_factory=HeldOut)
    reward_hacking: Hacking = field(default_factory=Hacking)
    before_after: BeforeAfter | None = field(default_factory=BeforeAfter)
    sample_grid: SampleGrid = field(default_factory=SampleGrid)
    trackers: list[Literal["tensorboard", "wandb", "trackio", "swanlab"]] = field(default_factory=list)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)

    def __post_init__(self) -> None:
        _require_rewards(self.rewards)
        if all(reward.weight == 0 for reward in self.rewards.values()):
            raise ValueError("every reward has weight 0: nothing would be trained; give one a weight")
        if trained := [
            name for name in self.reward_hacking.rewards if name in self.rewards and self.rewards[name].weight
        ]:
            raise ValueError(
                f"reward_hacking.rewards.{trained[0]} is trained on, and would see nothing: name another reward"
            )

    def watched(self) -> list[HeldOut | Hacking | BeforeAfter]:
        """What is evaluated before, while and after training."""
        looks = [chosen for chosen in (self.held_out, self.reward_hacking) if chosen.every]
        return [*looks, *([self.before_after] if self.before_after else [])]


def _require_positive(settings: object, *names: str) -> None:
    for name in names:
        value = vars(settings)[name]
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _require_rewards(rewards: Mapping[str, RewardChoice]) -> None:
    if not rewards:
        raise ValueError(
            "rewards is empty: name at least one, as in --rewards.strict.function rewards.shapes.ShapesReward"
        )


@dataclass(frozen=True)
class EvaluateShapes(Amount):
    """An evaluation of a model in the shapes world.

    ``samples`` is a folder that another program filled, to be judged in place of a model's: files anywhere in it, and a
    prompts.jsonl with a line {"file_name": ..., "prompt": ...} for each.
    """

    output: str = field(kw_only=True)
    samples: str | None = None
    model: Model = field(default_factory=Model)
    lora: str | None = None
    suite: Literal["val", "iid", "comp", "len"] = "comp"
    sampling: Sampling = field(default_factory=lambda: Sampling(sigmas=LINEAR_TEN))


@dataclass(frozen=True)
class EvaluateTones(EvaluateShapes):
    """An evaluation of a model in the tones world.

    ``samples`` is a folder of WAV and FLAC files that another program made, to be judged in place of a model's, and a
    prompts.jsonl with a line {"file_name": ..., "prompt": ...} for each.
    """

    model: Model = field(default_factory=lambda: Model("tones-audio"))
    sampling: Sampling = field(default_factory=lambda: Sampling(50))


@dataclass(frozen=True)
class Calibrate(Train):
    """A training configuration whose noise levels are to be found; ``output`` is the JSON file to write."""

    calibration: Calibration = field(default_factory=Calibration)


@dataclass(frozen=True)
class Steer:
    """A search for the best sample of every prompt; ``prompts`` as in training. ``lora`` steers a tuned model;
    ``audio`` is the format of what can be heard.
    """

    output: str
    prompts: str
    rewards: dict[str, RewardChoice] = field(default_factory=dict, kw_only=True)
    strategy: Strategy
    budget: Budget | None = None
    model: Model = field(default_factory=Model)
    lora: str | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(20))
    batch_size: int = 32
    seed: int = 0
    limit: int | None = None
    audio: AudioFormat = "wav"

    def __post_init__(self) -> None:
        _require_rewards(self.rewards)
        _require_positive(self, "batch_size", "limit")


@dataclass(frozen=True)
class TrainNoiseAware:
    """A student that learns to tell from previews what the ``rewards`` will say of the clean sample.

    ``count`` trajectories of every one of the first ``limit`` prompts are recorded at the network evaluations
    ``steps``, and as many of ``held_out`` prompts to validate on.
    """

    output: str
    rewards: dict[str, RewardChoice] = field(default_factory=dict, kw_only=True)
    student: nn.Module
    prompts: str = "shapes:train"
    held_out: str = "shapes:val"
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=lambda: Sampling(20))
    steps: tuple[int, ...] = (2, 4, 6, 8, 10, 13, 16)
    count: int = 8
    limit: int = 512
    distillation: Distillation = field(default_factory=Distillation)
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _require_rewards(self.rewards)
        _require_positive(self, "count", "limit", "batch_size")


@dataclass(frozen=True)
class Prices:
    """What a forward, a decode and each reward cost on this machine, in seconds of one sample in batches of the first
    ``batch_size`` prompts.
    """

    output: str
    rewards: dict[str, RewardChoice] = field(default_factory=dict)
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=lambda: Sampling(20))
    prompts: str = "shapes:val"
    batch_size: int = 32
    repeats: int = 5

    def __post_init__(self) -> None:
        _require_positive(self, "batch_size", "repeats")


@dataclass(frozen=True)
class Compare:
    """Recipes side by side: each of ``runs`` is the training configuration in the file ``base`` with these settings in
    place of its own, once for each seed; those named in ``once`` take the first seed only.
    """

    output: str
    base: str
    runs: dict[str, dict[str, Any]]
    seeds: list[int]
    once: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.runs or not self.seeds:
            raise ValueError("a comparison needs at least one entry in runs and one in seeds")
        if wrong := [name for name in self.runs if not re.fullmatch(r"[\w+-][\w .+-]*", name)]:
            raise ValueError(f"runs has a name that is no folder's: {wrong[0]!r}; use letters, digits, _, -, + and .")
        if unknown := set(self.once) - set(self.runs):
            raise ValueError(f"once names {', '.join(sorted(unknown))}, which runs does not have")

    def jobs(self) -> list[tuple[str, int]]:
        """Every (run, seed), seed by seed, so that an unfinished comparison is an even one."""
        return [
            (name, seed)
            for place, seed in enumerate(self.seeds)
            for name in self.runs
            if place == 0 or name not in self.once
        ]


@dataclass(frozen=True)
class Export:
    """What a run trained, as others take it: the adapter ("lora"), the network with it in its weights ("merged"), or a
    whole diffusers folder ("pipeline").
    """

    run: str
    output: str
    form: Literal["lora", "merged", "pipeline"] = "lora"


class ConfigurationError(ValueError):
    """A configuration that cannot be used; the message says what to write instead."""


REFUSED = (ValueError, FileNotFoundError, FileExistsError, PermissionError, RewardError, DivergedError)
"""What bad input raises; the message is for the one who wrote it."""


def parse(settings: type[Any], arguments: Sequence[str], command: str) -> tuple[Any, dict[str, Any]]:
    """An instance of the dataclass ``settings`` from ``--config`` files and overrides, and the same as plain JSON.

    Raises ConfigurationError; ``--help`` and ``--print_config`` exit.
    """
    parser = ArgumentParser(
        prog=f"genalign {command}", description=settings.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the settings below")
    parser.add_class_arguments(settings, None)
    try:
        parsed = parser.parse_args(list(arguments))
        plain = _plain(parser, parsed)
        values = parser.instantiate(parsed)
        return settings(**{name: values[name] for name in settings.__dataclass_fields__}), plain
    except (ArgumentError, ValueError, TypeError) as error:
        files = [Path(word) for word in arguments if word.endswith((".yaml", ".yml", ".json"))]
        source = "\n".join([*arguments, *(path.read_text("utf-8", "replace") for path in files if path.is_file())])
        raise ConfigurationError(explain(str(error), _keys(parser), source)) from error


def model_of(plain: Mapping[str, Any]) -> Model:
    """The model of a run's config.json."""
    found = dict(plain["model"])
    return Model(**{**found, "memory": Memory(**found.get("memory", {}))})


def _plain(parser: ArgumentParser, parsed: Namespace) -> dict[str, Any]:
    text: str = parser.dump(parsed, format="json", skip_unset=False)
    plain: dict[str, Any] = json.loads(text)
    plain.pop("config", None)
    return plain


def _keys(parser: ArgumentParser) -> list[str]:
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]
    of_rewards = [f"rewards.{name}" for name in RewardChoice.__dataclass_fields__]
    return known + of_rewards + [f"recipe.{name}" for name in inspect.signature(flow_grpo).parameters]


def require_device(name: str) -> None:
    """Raise ValueError for a name that torch does not know, or a CUDA device that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"model.device {name!r} is no device: give cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"model.device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here: give"
            " --model.device cpu, or install the torch of your GPU"
        )


def dtype(name: Precision) -> torch.dtype:
    """The torch dtype of a configured precision."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
