"""Settings of the training loop: size of a round, optimization, and limits on failures."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal

import torch
from torch import nn

from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.types import PromptSet

logger = logging.getLogger(__name__)
_PROMPTS, _SAMPLES, _UPDATES = 16, 96, 2  # the largest sizes of a round, a batch and the updates that are not set


@dataclass(frozen=True)
class TrainerSettings:
    """Size of a round, optimization, and limits on failures.

    A round samples ``prompts_per_round`` x ``group_size`` samples in batches, and makes ``updates_per_round`` optimizer
    steps on them. Sizes that are null fit the prompt set (``fit``).

    Args:
        rounds: Number of rounds after which the run ends.
        max_nfe: Number of denoiser evaluations of single samples (guidance counts twice) with whose round the run ends,
            if that comes first; null for no limit.
        prompts_per_round: Number of different prompts in a round; null takes 16, or as many as a small prompt set has.
        group_size: Number of samples of each prompt, which are compared with each other.
        batch_size: Number of samples on the device at once, a multiple of ``group_size``; null takes up to 96.
        updates_per_round: Number of optimizer steps in a round, each on another part of its samples; null takes 2, or 1
            where the prompts do not divide.
        learning_rate: Learning rate of the optimizer, at its highest.
        learning_rate_schedule: Learning rate after the warm-up: constant, or falling to zero at the end of the run,
            linearly or as half a cosine.
        warmup_rounds: Number of rounds in which the learning rate rises linearly to ``learning_rate``.
        optimizer: "adamw", or "adamw8bit" with moments in 8 bits (bitsandbytes, an extra).
        weight_decay: Weight decay of the optimizer.
        max_grad_norm: Norm to which gradients are clipped.
        seed: Seed of the prompts' order, of all noise and of a new adapter.
        max_failed_fraction: Fraction of a round's samples without a score above which the run stops.
        max_skipped_updates: Number of consecutive updates with a gradient that is not finite after which the run stops.
        on_out_of_memory: Whether a run stops if memory runs out in an update, or continues with half the micro-batch,
            which changes gradients by rounding only.
        overlap_scoring: Whether a batch is decoded and scored in a thread while the next one is sampled, for rewards
            that wait, such as for a server. Results are the same; one more batch is in memory.
    """

    rounds: int = 100
    max_nfe: int | None = None
    prompts_per_round: int | None = None
    group_size: int = 12
    batch_size: int | None = None
    updates_per_round: int | None = None
    learning_rate: float = 3e-4
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_rounds: int = 0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    seed: int = 0
    max_failed_fraction: float = 0.05
    max_skipped_updates: int = 5
    on_out_of_memory: Literal["stop", "halve"] = "stop"
    overlap_scoring: bool = True

    def __post_init__(self) -> None:
        counts = ("rounds", "max_nfe", "prompts_per_round", "batch_size", "updates_per_round", "max_skipped_updates")
        for name in counts:
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"training.{name} must be at least 1, not {value}")
        for name in ("learning_rate", "max_grad_norm"):
            if not vars(self)[name] > 0:
                raise ValueError(f"training.{name} must be positive, not {vars(self)[name]}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"training.seed must fit into 64 bits, not be {self.seed}")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"training.max_failed_fraction must be in [0, 1], not {self.max_failed_fraction}")
        if not 0 <= self.warmup_rounds < self.rounds:
            raise ValueError(
                f"training.warmup_rounds is {self.warmup_rounds} of {self.rounds} rounds: give a number from 0 to"
                f" {self.rounds - 1}"
            )
        self._require_whole_groups()
        if self.prompts_per_round:
            self._sizes(self.prompts_per_round, 1)  # refuses sizes that do not divide

    def _require_whole_groups(self) -> None:
        """Raise ValueError for groups that cannot be compared, or that batches do not hold whole."""
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}: a group needs at least 2 samples to compare")
        if self.batch_size and self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of group_size {self.group_size}, so that groups stay"
                f" whole: try {self.group_size * max(1, self.batch_size // self.group_size)}"
            )

    def fit(self, prompts: PromptSet, processes: ProcessGroup = SINGLE_PROCESS, notice: bool = False) -> FittedSettings:
        """Choose the sizes of a round that are None.

        As many updates as fit are preferred, then as many prompts, then batches as large as possible, each up to its
        default.

        Args:
            prompts: The prompts, of which a round takes different ones.
            processes: The ranks that share the batches of an update.
            notice: Whether a line in the log names sizes that are smaller for a small prompt set.

        Raises:
            ValueError: No sizes fit the prompts, the ranks and the sizes that are set.
        """
        distinct = len({prompt.text for prompt in prompts.prompts})
        sizes = self._sizes(distinct, processes.world_size)
        fitted = FittedSettings(**(asdict(self) | sizes))
        if notice and processes.is_main and distinct < _PROMPTS and any(vars(self)[name] is None for name in sizes):
            logger.info(
                "a round takes %d of the %d prompts, in %d updates of batches of %d samples: for other sizes, set"
                " training.prompts_per_round, updates_per_round and batch_size",
                *(fitted.prompts_per_round, distinct, fitted.updates_per_round, fitted.batch_size),
            )
        return fitted

    def _sizes(self, prompts: int, processes: int) -> dict[str, int]:
        size, most = self.group_size, min(prompts, _PROMPTS)
        updates = [self.updates_per_round] if self.updates_per_round else range(_UPDATES, 0, -1)
        rounds = [self.prompts_per_round] if self.prompts_per_round else range(most, 0, -1)
        batches = [self.batch_size // size] if self.batch_size else range(max(1, _SAMPLES // size), 0, -1)
        for steps, count, groups in itertools.product(updates, rounds, batches):
            if count % (groups * steps * processes) == 0:
                return {"prompts_per_round": count, "batch_size": groups * size, "updates_per_round": steps}
        count, among = self.prompts_per_round or most, f" on {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"prompts_per_round {count} x group_size {size} = {count * size} samples do not divide into"
            f" {self.updates_per_round or 1} updates of batches of {self.batch_size or size}{among}: change one of them"
        )

    def progress(self, rounds: int, nfe: int) -> float:
        """The fraction of the run that is complete after ``rounds`` and ``nfe``; 1 or more at its end."""
        return max(rounds / self.rounds, nfe / self.max_nfe if self.max_nfe else 0.0)

    def rate(self, rounds: int, nfe: int) -> float:
        """The learning rate of the round after ``rounds`` and ``nfe``."""
        if rounds < self.warmup_rounds:
            return self.learning_rate * (rounds + 1) / self.warmup_rounds
        progress = self.progress(rounds, nfe)
        warmup = progress * self.warmup_rounds / rounds if rounds else 0.0  # the progress at the end of the warm-up
        return self.learning_rate * _schedule(self.learning_rate_schedule)((progress - warmup) / (1 - warmup))


@dataclass(frozen=True)
class FittedSettings(TrainerSettings):
    """Trainer settings with all sizes of a round, as ``TrainerSettings.fit`` returns them."""

    prompts_per_round: int = _PROMPTS
    batch_size: int = _SAMPLES
    updates_per_round: int = _UPDATES

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that fit the prompts, by the names of their settings."""
        return {name: vars(self)[name] for name in ("prompts_per_round", "batch_size", "updates_per_round")}


@cache
def _schedule(name: str) -> Callable[[float], float]:
    """Return a schedule of diffusers as the factor of the learning rate at a fraction of the run."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))])
    factor: Callable[[float], float] = get_scheduler(
        name, optimizer, num_warmup_steps=0, num_training_steps=1
    ).lr_lambdas[0]
    return factor


def optimizer_class(settings: TrainerSettings) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer's class. Raises ValueError if bitsandbytes is missing for "adamw8bit"."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("training.optimizer 'adamw8bit' needs bitsandbytes: pip install 'genalign[memory]'") from None
    optimizer: type[torch.optim.Optimizer] = AdamW8bit
    return optimizer
