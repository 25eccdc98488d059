"""Updates with non-finite gradients, which are skipped and saved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from genalign.algorithms.interfaces import UpdateBatch
from genalign.runtime.files import save_state, with_prefix, write_json
from genalign.types import Prompt

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """Too many consecutive updates had non-finite gradients."""


@dataclass(frozen=True)
class SkippedUpdate:
    """An update that was skipped because its gradient was not finite.

    Args:
        round: Index of the round.
        update: Index of the update in the round.
        grad_norm: Norm of the gradient.
        loss: Sum of the losses of the round so far.
        batches: Batches of the update.
        prompts: Prompts of the round.
    """

    round: int
    update: int
    grad_norm: float
    loss: float
    batches: Sequence[UpdateBatch]
    prompts: Sequence[Prompt]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the batches, with names such as "batch.0.prediction"."""
        tensors: dict[str, Tensor] = {}
        for number, batch in enumerate(self.batches):
            tensors |= with_prefix(
                f"batch.{number}.", batch.rollout.tensors() | {"credit": batch.credit, "group": batch.group}
            )
        return tensors

    def as_dict(self) -> dict[str, object]:
        """Return everything else for JSON, with the names of the non-finite tensors."""
        batches = [
            {
                "steps": list(batch.rollout.steps),
                "prompts": [self.prompts[row].text for row in batch.rollout.inputs.prompt.tolist()],
                "noise_seeds": list(batch.rollout.inputs.noise_seeds),
                "step_seeds": list(batch.rollout.inputs.step_seeds),
            }
            for batch in self.batches
        ]
        return {
            "round": self.round,
            "update": self.update,
            "grad_norm": str(self.grad_norm),
            "loss": str(self.loss),
            "not_finite": [name for name, tensor in self.tensors().items() if not bool(tensor.isfinite().all())],
            "batches": batches,
        }


@dataclass
class NonFiniteGuard:
    """Counts consecutive skipped updates, and stops the run after ``max_in_row`` of them.

    The first ``max_written`` of a rank are written to ``folder``, as round-000012-update-0.safetensors and .json.
    """

    max_in_row: int = 5
    folder: Path | None = None
    max_written: int = 3
    in_row: int = 0
    written: list[Path] = field(default_factory=list)

    def skip(self, update: SkippedUpdate) -> None:
        """Count, log and write a skipped update. Raises DivergedError after too many in a row."""
        self.in_row += 1
        where = f", see {self.written[-1]}" if self.written else ""
        if self.folder is not None and len(self.written) < self.max_written:
            path = self.folder / f"round-{update.round:06d}-update-{update.update}.safetensors"
            try:
                save_state(path, update.tensors(), {})
                write_json(path.with_suffix(".json"), update.as_dict())
            except OSError as error:
                where = f", and its tensors could not be written ({error})"
            else:
                self.written.append(path)
                where = f", see {path}"
        numbers = update.round + 1, update.update, update.grad_norm, update.loss, where
        logger.warning("Round %d, update %d was skipped: gradient norm %s, loss %s%s", *numbers)
        if self.in_row >= self.max_in_row:
            raise DivergedError(
                f"{self.in_row} updates in a row had a gradient that is not finite (training.max_skipped_updates)"
                f"{where}. Try a lower training.learning_rate, or auto, model.dtype float32 or less guidance"
            )
