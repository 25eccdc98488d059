"""The settings of ``genalign train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from genalign.algorithms.recipe import Recipe
from genalign.cli.evaluate_settings import EvaluationSize
from genalign.cli.generation_settings import Generation, require_rewards
from genalign.diffusion.policy import Lora
from genalign.diffusion.sampling import Sampling
from genalign.training.checkpointing import Checkpointing
from genalign.training.reward_hacking import Actions, Limits
from genalign.training.round_log import SampleGrid
from genalign.training.settings import TrainerSettings
from genalign.training.time_budget import TimeBudget
from genalign.types import AnyCallable


@dataclass(frozen=True)
class HeldOut(EvaluationSize):
    """An evaluation on held-out prompts during training.

    Args:
        prompts: Held-out prompts, a file or a split of a world; null takes ``held_out_fraction`` of the training
            prompts, which are then not trained on.
        every: Number of rounds between two evaluations; 0 evaluates only by time, or never.
        every_seconds: Seconds of training, excluding evaluations, between two evaluations; null evaluates only by
            rounds.
        scorers: Named rewards, in addition to the verifier of the prompts' world; without either, the rewards of the
            run.
    """

    samples_per_task: int = 32
    seeds: int = 1
    prompts: str | None = None
    every: int = 0
    every_seconds: float | None = None
    scorers: dict[str, AnyCallable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every_seconds is not None and not self.every_seconds > 0:
            raise ValueError(
                f"held_out.every_seconds must be positive, not {self.every_seconds}; null evaluates only by rounds"
            )

    @property
    def is_on(self) -> bool:
        """Whether the evaluation runs at all."""
        return bool(self.every or self.every_seconds)


@dataclass(frozen=True)
class BeforeAfter(EvaluationSize):
    """An evaluation before and after training, with the same prompts and noises.

    Args:
        prompts: A prompt file, or a split of a world; null takes ``held_out_fraction`` of the training prompts, which
            are then not trained on.
    """

    prompts: str | None = None


@dataclass(frozen=True)
class Hacking(EvaluationSize):
    """The monitor of reward hacking (``genalign.training.reward_hacking``).

    Args:
        prompts: Prompts of the monitor, a file or a split of a world; null takes ``held_out_fraction`` of the training
            prompts, which are then not trained on.
        every: Number of rounds between two reports; 0 turns them off.
        rewards: Named rewards that are not trained on; by default those of the run with weight 0.
        features: A feature extractor for the diversity of the samples and their drift.
        diagnostics: Functions of a set of samples and its prompts, which are only reported.
        limits: Thresholds at which a signal turns amber or red.
        on_red: Reaction to a red report.
    """

    samples_per_task: int = 16
    seeds: int = 2
    prompts: str | None = None
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
                "reward_hacking.seeds and reward_hacking.samples_per_task must be at least 2, to measure variety"
            )

    @property
    def is_on(self) -> bool:
        """Whether there are reports of reward hacking: ``every`` is above 0."""
        return bool(self.every)


@dataclass(frozen=True, kw_only=True)
class Train(Generation):
    """A training run.

    `genalign train --resume RUN` continues the run in that folder, and `--resume` without RUN the one in ``output``.

    Args:
        output: Folder of the run.
        prompts: Training prompts: a .txt file with one per line, a GenEval .jsonl file, a dataset
            (hf://datasets/owner/name:split#column), or a split of a world, as in shapes:train.
        recipe: Training method, as in genalign.flow_grpo. with_credit changes its advantages; --recipe.credit.help
            lists the rules.
        sampling: Sampling of the training samples.
        evaluation: Sampling of all evaluations; null takes ``sampling``.
        training: Geometry of a round, optimizer, and reaction to failures.
        max_seconds: Stop after the round in which training, excluding evaluations, reaches this many seconds; null for
            no limit.
        time_budget: Time to which the number of rounds is fitted if ``training.rounds`` is null.
        lora: The adapter to train; null trains the whole network.
        init_lora: An adapter to continue from, with its own rank and layers, instead of a new one.
        ema_decay: Decay of the exponential moving average of the weights, which is evaluated and exported.
        held_out: Evaluations on held-out prompts during training.
        reward_hacking: Monitor of reward hacking.
        before_after: Evaluation before and after training; null for none.
        held_out_fraction: Fraction of each task's training prompts for evaluations without their own prompts.
        sample_grid: Samples that the model generates during training.
        trackers: Experiment trackers that receive the metrics.
        checkpoint: Checkpoints of the run.
    """

    recipe: Recipe
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Sampling | None = None
    training: TrainerSettings = field(default_factory=TrainerSettings)
    max_seconds: float | None = None
    time_budget: TimeBudget = field(default_factory=TimeBudget)
    lora: Lora | None = field(default_factory=Lora)
    init_lora: str | None = None
    ema_decay: float = 0.9
    held_out: HeldOut = field(default_factory=HeldOut)
    reward_hacking: Hacking = field(default_factory=Hacking)
    before_after: BeforeAfter | None = None
    held_out_fraction: float = 0.2
    sample_grid: SampleGrid = field(default_factory=SampleGrid)
    trackers: list[Literal["tensorboard", "wandb", "trackio", "swanlab"]] = field(default_factory=list)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)

    def __post_init__(self) -> None:
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be positive, not {self.max_seconds}; null sets no limit")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be between 0 and 1, not {self.held_out_fraction}")
        require_rewards(self.rewards)
        weighted = [name for name, reward in self.rewards.items() if reward.weight]
        if not weighted:
            raise ValueError("every reward has weight 0, so nothing would be trained: give at least one a weight")
        if self.training.group_size == 1 and self.training.data is None:
            raise ValueError(
                "training.group_size is 1: a group needs at least 2 samples to compare; 1 is only for a pool"
                " (training.data) and a recipe that compares none"
            )
        if trained := [name for name in self.reward_hacking.rewards if name in weighted]:
            raise ValueError(
                f"reward_hacking.rewards.{trained[0]} is trained on, so it cannot show reward hacking: name"
                " another reward"
            )

    def evaluation_prompts(self) -> dict[str, str | None]:
        """Return the prompt sources of all evaluations before, during and after training, by section."""
        sections = {
            "held_out": self.held_out,
            "reward_hacking": self.reward_hacking,
            "before_after": self.before_after,
        }
        return {name: section.prompts for name, section in sections.items() if section and section.is_on}
