"""Smaller batches after running out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch raised ``error`` because memory ran out, on any device."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in message for words in _OUT_OF_MEMORY)


def free_memory() -> None:
    """Return memory that torch's allocator has cached to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class PartSizes:
    """The largest numbers of samples that are sampled, and decoded, at once; None for whole batches.

    With ``halving`` they are halved for the rest of the run when memory runs out. Samples of smaller parts may differ
    in the last bits.
    """

    halving: bool = False
    sampling: int | None = None
    decoding: int | None = None

    def map(self, phase: Literal["sampling", "decoding"], count: int, compute: Callable[[slice], T]) -> list[T]:
        """Call ``compute`` on consecutive parts of ``count`` samples, and on smaller ones after it ran out of memory.

        Raises torch's error if a single sample is too many.
        """
        results, start = list[T](), 0
        while start < count:
            size = min(getattr(self, phase) or count, count)
            try:
                results.append(compute(slice(start, min(start + size, count))))
            except RuntimeError as error:
                if not self.halving or size == 1 or not is_out_of_memory(error):
                    raise
            else:
                start += size
                continue
            setattr(self, phase, size // 2)  # out of the except clause, whose error holds the tensors
            logger.warning("Out of memory in %s %d samples at once: continuing with %d", phase, size, size // 2)
            free_memory()
        return results

    def agree(self, ranks: Sequence[PartSizes]) -> None:
        """Take the smallest sizes of all ranks."""
        for phase in ("sampling", "decoding"):
            sizes = [size for rank in ranks if (size := getattr(rank, phase)) is not None]
            setattr(self, phase, min(sizes, default=None))
