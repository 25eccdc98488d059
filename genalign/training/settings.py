"""Settings of the training loop: size of a round, optimization, and limits on failures."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import nn

from genalign.algorithms.interfaces import Unit
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.training.trust_region import TrustRegion
from genalign.types import PromptSet

logger = logging.getLogger(__name__)
_PROMPTS, _SAMPLES, _UPDATES = 16, 96, 2  # the largest sizes of a round, a batch and the updates that are not set
_ROUNDS = 100  # where none are set


@dataclass(frozen=True)
class TrainerSettings:
    """Size of a round, optimization, and limits on failures.

    A round samples ``prompts_per_round`` x ``group_size`` samples in batches, and makes ``updates_per_round`` optimizer
    steps on them. Sizes that are null are fitted to the prompt set (``fit``).

    Args:
        rounds: Number of rounds after which the run ends; null takes 100, or as many as fit a ``time_budget``.
        max_nfe: Stop after the round in which the total NFE (denoiser evaluations of single samples; guidance counts
            twice) reaches this number; null for no limit.
        prompts_per_round: Number of different prompts per round; null takes 16, or as many as a small prompt set has.
        group_size: Number of samples per prompt, which are compared with each other; 1 for recipes that compare none,
            such as sft and kto, on a pool of single samples (``data``).
        batch_size: Largest number of samples that are sampled at once; null takes up to 96. An update's samples are
            divided into batches of nearly equal size, the same number on each process.
        micro_batch: Largest number of samples per backward pass, which does not change gradients; null takes whole
            batches. Smaller values need less memory.
        updates_per_round: Number of optimizer steps per round, each on a different part of its samples; null takes 2,
            or 1 if the prompts do not divide.
        epochs: Number of passes over a round's samples, each of ``updates_per_round`` updates; all but the first are in
            random order.
        learning_rate: The highest learning rate of the optimizer; "auto" adapts it after every round so that the policy
            moves as far as ``trust_region`` says.
        trust_region: How far each round moves the policy, for the learning rate "auto".
        learning_rate_schedule: Learning rate after the warm-up: constant, or falling to zero at the end of the run,
            linearly or as half a cosine.
        warmup_rounds: Number of rounds in which the learning rate rises linearly to ``learning_rate``.
        optimizer: "adamw", or "adamw8bit" with 8-bit moments (bitsandbytes, an extra).
        weight_decay: Weight decay of the optimizer.
        loss_scale: Initial loss scale of a network that computes in float16: a power of two, which is halved when
            gradients overflow. It has no effect on other networks.
        max_grad_norm: Norm to which gradients are clipped.
        seed: Seed of the prompt order, of all noise and of a new adapter.
        max_failed_fraction: Stop if more than this fraction of a round's samples has no score.
        max_skipped_updates: Stop after this many consecutive updates with non-finite gradients.
        max_rounds_without_credit: Stop after this many consecutive rounds in which no sample had credit, as when all
            scores are equal; null never stops.
        on_out_of_memory: Whether the run stops when memory runs out, or continues with half as many samples at a time
            in that phase: sampling, decoding, or updates. Results change only by rounding.
        deterministic: Use only algorithms of torch that give the same bits each time, and stop where there is none. On
            a CPU results are the same without it; on a GPU it costs speed, and needs the environment variable
            CUBLAS_WORKSPACE_CONFIG.
        overlap_scoring: Decode and score a batch in a thread while the next one is sampled, which helps rewards that
            wait, such as for a server. Results are the same; one more batch is in memory.
        offload_rollouts: Keep the stored states of a round on the CPU until they are trained. Results are the same; a
            round of large images may not fit into a GPU otherwise.
        data: Folder of a pool (genalign collect) to learn from instead of sampling, for recipes on final samples; null
            samples.
        user_dropout: Fraction of a round's prompts for which the network does not see the user (model.users).
    """

    rounds: int | None = None
    max_nfe: int | None = None
    prompts_per_round: int | None = None
    group_size: int = 12
    batch_size: int | None = None
    micro_batch: int | None = None
    updates_per_round: int | None = None
    epochs: int = 1
    learning_rate: float | Literal["auto"] = "auto"
    trust_region: TrustRegion = field(default_factory=TrustRegion)
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_rounds: int = 0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: float = 1e-4
    loss_scale: float = 65536.0
    max_grad_norm: float = 1.0
    seed: int = 0
    max_failed_fraction: float = 0.05
    max_skipped_updates: int = 5
    max_rounds_without_credit: int | None = 20
    on_out_of_memory: Literal["stop", "halve"] = "stop"
    deterministic: bool = False
    overlap_scoring: bool = True
    offload_rollouts: bool = False
    data: str | None = None
    user_dropout: float = 0.0

    def __post_init__(self) -> None:
        counts = ("rounds", "max_nfe", "prompts_per_round", "batch_size", "micro_batch", "updates_per_round")
        for name in (*counts, "group_size", "epochs", "max_skipped_updates", "max_rounds_without_credit"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"training.{name} must be at least 1, not {value}")
        for name in ("learning_rate", "loss_scale", "max_grad_norm"):
            if vars(self)[name] != "auto" and not vars(self)[name] > 0:
                raise ValueError(f"training.{name} must be positive, not {vars(self)[name]}")
        if self.learning_rate != "auto" and self.trust_region != TrustRegion():
            raise ValueError(
                f"training.trust_region has no effect on a fixed learning rate: set training.learning_rate to auto"
                f" instead of {self.learning_rate}, or leave trust_region out"
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"training.seed must fit into 64 bits, which {self.seed} does not")
        for name in ("max_failed_fraction", "user_dropout"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"training.{name} must be in [0, 1], not {vars(self)[name]}")
        rounds = self.rounds or _ROUNDS
        if not 0 <= self.warmup_rounds < rounds:
            raise ValueError(
                f"training.warmup_rounds is {self.warmup_rounds} of {rounds} rounds: give a number from 0 to"
                f" {rounds - 1}"
            )
        self._check_round()

    def _check_round(self) -> None:
        prompts, updates = self.prompts_per_round, self.updates_per_round
        if prompts and updates and prompts % updates:
            raise ValueError(
                f"training.prompts_per_round {prompts} does not divide into {updates} updates: set"
                f" training.updates_per_round to 1, or prompts_per_round to {max(1, prompts // updates) * updates}"
            )

    def fit(
        self,
        prompts: PromptSet,
        unit: Unit,
        processes: ProcessGroup = SINGLE_PROCESS,
        notice: bool = False,
        group_reward: str | None = None,
    ) -> FittedSettings:
        """Choose the sizes of a round that are None.

        Updates are maximized first, then prompts, then batches, each up to its default.

        Args:
            prompts: The prompts, of which a round takes different ones.
            unit: The samples that the loss couples, which stay in one batch.
            processes: The ranks that share the samples of an update.
            notice: Whether to log sizes that are smaller for a small prompt set.
            group_reward: The name of a reward that compares the samples of a group, so that no batch may split one.

        Raises:
            ValueError: No sizes fit the prompts, the ranks and the sizes that are set.
        """
        distinct = len({prompt.text for prompt in prompts.prompts})
        whole = unit != "sample" or group_reward
        least = processes.world_size * (self.group_size if whole else 1)  # samples of an update
        count, updates = self._prompts_and_updates(min(distinct, _PROMPTS), least)
        per_update = count * self.group_size // updates
        default = max(self.group_size, _SAMPLES // self.group_size * self.group_size)
        sizes = {
            "rounds": self.rounds or _ROUNDS,
            "prompts_per_round": count,
            "batch_size": self.batch_size or min(default, per_update),
            "updates_per_round": updates,
        }
        fitted = FittedSettings(**(vars(self) | sizes | ({"group_reward": group_reward} if group_reward else {})))
        batches = fitted.batch_sizes(unit, processes.world_size)  # refuses sizes that do not fit
        if (
            notice
            and processes.is_main
            and distinct < _PROMPTS
            and any(vars(self)[name] is None for name in fitted.sizes)
        ):
            logger.info(
                "a round takes %d of the %d prompts, in %d updates of batches of %d samples: for other sizes, set"
                " training.prompts_per_round, updates_per_round and batch_size",
                *(count, distinct, updates, max(batches)),
            )
        return fitted

    def _prompts_and_updates(self, most: int, least: int) -> tuple[int, int]:
        """Choose the numbers of prompts, up to ``most``, and of updates, of at least ``least`` samples if possible."""
        updates = [self.updates_per_round] if self.updates_per_round else range(_UPDATES, 0, -1)
        counts = [self.prompts_per_round] if self.prompts_per_round else range(most, 0, -1)
        fitting = [(count, steps) for steps, count in itertools.product(updates, counts) if count % steps == 0]
        if not fitting:
            raise ValueError(
                f"{most} prompts do not divide into {self.updates_per_round} updates: set training.updates_per_round to"
                f" at most {most}"
            )
        large = (sizes for sizes in fitting if sizes[0] * self.group_size >= least * sizes[1])
        return next(large, fitting[0])

    def progress(self, rounds: int, nfe: int) -> float:
        """The fraction of the run that is complete after ``rounds`` and ``nfe``; at least 1 at its end."""
        return max(rounds / (self.rounds or _ROUNDS), nfe / self.max_nfe if self.max_nfe else 0.0)

    def rate_factor(self, rounds: int, nfe: int) -> float:
        """The learning rate of the round after ``rounds`` and ``nfe``, as a fraction of its maximum."""
        if rounds < self.warmup_rounds:
            return (rounds + 1) / self.warmup_rounds
        progress = self.progress(rounds, nfe)
        warmup = progress * self.warmup_rounds / rounds if rounds else 0.0  # the progress at the end of the warm-up
        return _schedule(self.learning_rate_schedule)((progress - warmup) / (1 - warmup))


@dataclass(frozen=True)
class FittedSettings(TrainerSettings):
    """Trainer settings with all sizes, as ``TrainerSettings.fit`` returns them.

    ``group_reward`` names a reward that compares the samples of a group, so batches hold whole groups.
    """

    rounds: int = _ROUNDS
    prompts_per_round: int = _PROMPTS
    batch_size: int = _SAMPLES
    updates_per_round: int = _UPDATES
    group_reward: str | None = None

    def batch_sizes(self, unit: Unit, processes: int = 1) -> tuple[int, ...]:
        """Divide a round into batches, which the ranks take in turn; return their sizes, in the order of the samples.

        Every update has the same number of batches, a multiple of ``processes``, which differ by at most one unit. A
        batch is empty if a rank has none.

        Args:
            unit: The samples that the loss couples, which stay in one batch.
            processes: The number of ranks.

        Raises:
            ValueError: There are more ranks than units, or a unit does not fit into a batch or micro-batch.
        """
        tied = 1 if unit == "sample" else self.group_size  # samples that no batch and no backward pass may separate
        multiple, whole = (self.group_size, "groups") if tied > 1 or self.group_reward else (1, "samples")
        for name, of in (("batch_size", multiple), ("micro_batch", tied)):
            size = vars(self)[name]
            if size and size % of:
                reason = "" if tied > 1 else f" for reward {self.group_reward!r}"
                raise ValueError(
                    f"training.{name} {size} must be a multiple of group_size {of}, so groups stay whole{reason}:"
                    f" try {of * max(1, size // of)}"
                )
        if unit == "batch" and self.micro_batch and self.micro_batch < self.batch_size:
            raise ValueError("the loss of this recipe couples a whole batch: leave training.micro_batch out")
        units = self.prompts_per_round * self.group_size // self.updates_per_round // multiple
        if processes > units:
            raise ValueError(
                f"{processes} processes cannot share updates of {units} {whole}: start at most {units}, or raise"
                " training.prompts_per_round or group_size"
            )
        count = processes * -(-units * multiple // (self.batch_size * processes))
        filled = min(count, units)
        bounds = [multiple * (min(number, filled) * units // filled) for number in range(count + 1)]
        return tuple(end - start for start, end in itertools.pairwise(bounds)) * self.updates_per_round

    @property
    def sizes(self) -> dict[str, int]:
        """The fitted sizes, by the names of their settings."""
        return {name: vars(self)[name] for name in ("prompts_per_round", "batch_size", "updates_per_round")}


@cache
def _schedule(name: str) -> Callable[[float], float]:
    """Return a schedule of diffusers as a function from the fraction of the run to the learning rate's factor."""
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
