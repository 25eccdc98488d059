"""The metrics of one training round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from genalign.scoring.budget import peak_memory


@dataclass(frozen=True)
class RoundResult:
    """The metrics of one round.

    ``log_ratio_max`` is the largest |log-ratio| of the round's first update, 0 in exact arithmetic. Updates that were
    skipped because their gradient was not finite (``skipped_updates``) are in no mean. ``metrics`` come from the method
    and from trainable rewards. ``samples``, ``nfe`` (denoiser evaluations of single samples), ``calls`` (all counted
    calls, see ``budget.Ledger``) and ``seconds`` count from the start of the run.
    """

    round: int
    reward: float
    reward_std: float
    rewards: dict[str, float]
    kl: float
    clip_fraction: float
    zero_std_share: float
    grad_norm: float
    loss: float
    log_ratio_max: float
    failed_rewards: int
    skipped_updates: int
    learning_rate: float
    metrics: dict[str, float]
    samples: int
    nfe: int
    calls: dict[str, int]
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return the row of metrics.jsonl, with null for non-finite values and the machine's figures in ``machine``."""

        def finite(value: object) -> object:
            if isinstance(value, dict):
                return {name: finite(inner) for name, inner in value.items()}
            return value if not isinstance(value, float) or math.isfinite(value) else None

        machine = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds if self.seconds else 0.0,
            "peak_memory_bytes": peak_memory(),
        }
        return {name: finite(value) for name, value in vars(self).items() if name != "seconds"} | {"machine": machine}
