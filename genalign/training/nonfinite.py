"""What goes wrong while learning: gradients that are not finite, and memory that runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from genalign.algorithms.interfaces import UpdateBatch
from genalign.runtime.files import save_state, with_prefix, write_json
from genalign.types import Prompt

logger = logging.getLogger(__name__)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class DivergedError(RuntimeError):
    """Too many updates in a row had a gradient that is not finite."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is how torch says so, on whatever device."""
    told = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in told for words in _NO_MEMORY)


@dataclass(frozen=True)
class BadUpdate:
    """An update of a round that was left out: its gradient's norm, the sum of the round's losses, and its batches,
    whose prompts are some of the round's ``prompts``."""

    round: int
    update: int
    grad_norm: float
    loss: float
    batches: Sequence[UpdateBatch]
    prompts: Sequence[Prompt]

    def tensors(self) -> dict[str, Tensor]:
        """What was learnt from, as "batch.0.prediction" and the like."""
        found: dict[str, Tensor] = {}
        for place, batch in enumerate(self.batches):
            found |= with_prefix(f"batch.{place}.", _tensors(batch))
        return found

    def about(self) -> dict[str, object]:
        """The rest, for JSON, and which of the tensors are not finite."""
        suspects = [name for name, tensor in self.tensors().items() if not bool(tensor.isfinite().all())]
        return {
            "round": self.round,
            "update": self.update,
            "grad_norm": str(self.grad_norm),
            "loss": str(self.loss),
            "not_finite": suspects,
            "batches": [self._origin(batch) for batch in self.batches],
        }

    def _origin(self, batch: UpdateBatch) -> dict[str, object]:
        start = batch.sampled.inputs
        return {
            "steps": list(batch.sampled.steps),
            "prompts": [self.prompts[row].text for row in start.prompt.tolist()],
            "noise_seeds": list(start.noise_seeds),
            "step_seeds": list(start.step_seeds),
        }


def _tensors(batch: UpdateBatch) -> dict[str, Tensor]:
    sampled = batch.sampled
    states = {"x": sampled.x, "x_next": sampled.x_next, "mean": sampled.mean, "prediction": sampled.prediction}
    return states | {"final": sampled.final, "credit": batch.credit, "group": batch.group}


@dataclass
class Skipping:
    """Counts updates that are left out: ``in_row`` of them, of which ``most`` end the run. The first ``kept`` of a
    process are written into ``folder``, as round-000012-update-0.safetensors and .json."""

    most: int = 5
    folder: Path | None = None
    kept: int = 3
    in_row: int = 0
    written: list[Path] = field(default_factory=list)

    def stepped(self) -> None:
        """An update was made."""
        self.in_row = 0

    def skipped(self, update: BadUpdate) -> None:
        """One was left out. Raises DivergedError for too many in a row."""
        self.in_row += 1
        where = self._write(update)
        told = f"round {update.round}, update {update.update}: the gradient's norm is {update.grad_norm}"
        logger.warning("%s and the loss %s; this update is left out%s", told, update.loss, where)
        if self.in_row >= self.most:
            raise DivergedError(
                f"{self.in_row} updates in a row had a gradient that is not finite (training.skipped_updates)"
                f"{where}: try a lower training.learning_rate, model.dtype float32 or bfloat16, or less guidance, and"
                " go on from the last checkpoint"
            )

    def _write(self, update: BadUpdate) -> str:
        if self.folder is None or len(self.written) >= self.kept:
            return f", see {self.written[-1]}" if self.written else ""
        path = self.folder / f"round-{update.round:06d}-update-{update.update}.safetensors"
        try:
            save_state(path, update.tensors(), {})
            write_json(path.with_suffix(".json"), update.about())
        except OSError as error:
            return f", and could not be kept ({error})"
        self.written.append(path)
        return f", see {path}"


def finite(norm: Tensor, loss: float) -> bool:
    """Whether an update may be made: of its gradient's norm () and the sum of its losses."""
    return bool(norm.isfinite()) and math.isfinite(loss)
