"""CUDA streams of two threads: one works on tensors of the other's stream without waiting on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Handover(Generic[T]):
    """A value for another thread, and the event after which its CUDA tensors are computed; None without CUDA."""

    value: T
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, value: T) -> Self:
        """Hand over a value that the current stream computes."""
        return cls(value, torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None)

    def take(self) -> T:
        """Return the value, for work on the current stream alone.

        What this stream is given from now on runs after the event, and the memory of the tensors is not used again
        before that work is done.
        """
        if self.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.event)
            for tensor in tensors_in(self.value):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        return self.value


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a value: a tensor, the arguments of a partial call, the parts of a collection or record."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[object] = ()
    if isinstance(value, functools.partial):
        parts = value.args, value.keywords
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = vars(value).values()
    for part in parts:
        yield from tensors_in(part)
