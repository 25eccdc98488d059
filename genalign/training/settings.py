"""Settings of the training loop: size of a round, optimization, and limits on failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class TrainerSettings:
    """Size of a round, optimization, and limits on failures.

    A round samples ``prompts_per_round`` x ``group_size`` samples in batches of ``batch_size``, and makes
    ``updates_per_round`` optimizer steps on them. A run ends after ``rounds``, or with the round that reaches
    ``max_nfe`` denoiser evaluations of single samples (guidance counts twice). The learning rate is constant, or falls
    linearly to zero at the end of the run. "adamw8bit" keeps Adam's moments in 8 bits (bitsandbytes, an extra).

    A run stops if more than ``max_failed_fraction`` of a round's samples could not be scored, and after
    ``max_skipped_updates`` consecutive updates that were skipped because their gradient was not finite. If memory runs
    out in an update, the run stops ("stop"), or continues with smaller micro-batches ("halve"), which changes gradients
    by rounding only.

    With ``overlap_scoring``, a batch is decoded and scored in a thread while the next one is sampled, for rewards that
    wait for something else, such as a server. Results are the same; one more batch is in memory.
    """

    rounds: int = 100
    max_nfe: int | None = None
    prompts_per_round: int = 16
    group_size: int = 12
    batch_size: int = 96
    updates_per_round: int = 2
    learning_rate: float = 3e-4
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
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
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"training.max_failed_fraction must be in [0, 1], not {self.max_failed_fraction}")
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}: a group needs at least 2 samples to compare")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of group_size {self.group_size}, so that groups stay"
                f" whole: try {self.group_size * max(1, self.batch_size // self.group_size)}"
            )
        samples = self.prompts_per_round * self.group_size
        if samples % (self.batch_size * self.updates_per_round):
            raise ValueError(
                f"prompts_per_round {self.prompts_per_round} x group_size {self.group_size} = {samples} samples do not"
                f" divide into {self.updates_per_round} updates of batches of {self.batch_size}: change one of them"
            )

    def require_shares(self, world_size: int) -> None:
        """Raise ValueError if the batches of an update do not divide among ``world_size`` ranks."""
        batches = self.prompts_per_round * self.group_size // (self.batch_size * self.updates_per_round)
        if batches % world_size:
            raise ValueError(
                f"an update's {batches} batches of {self.batch_size} samples do not divide among {world_size}"
                " processes: change training.batch_size, prompts_per_round or updates_per_round, or the number of"
                " processes"
            )

    def progress(self, rounds: int, nfe: int) -> float:
        """The fraction of the run that is complete after ``rounds`` and ``nfe``; 1 or more at its end."""
        return max(rounds / self.rounds, nfe / self.max_nfe if self.max_nfe else 0.0)

    def rate(self, progress: float) -> float:
        """The learning rate at a fraction of the run."""
        return self.learning_rate * (1 - progress if self.learning_rate_schedule == "linear" else 1.0)


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
