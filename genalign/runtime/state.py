"""What later rounds depend on: the state of a part of a run, and that of the process's own generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from genalign.runtime.distributed import Processes


@dataclass(frozen=True)
class State:
    """Tensors by name, and ``numbers``: whatever else JSON can hold."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


class Stateful(Protocol):
    """A part of a run that later rounds depend on."""

    def state(self) -> State:
        """All of it, between two rounds."""

    def restore(self, state: State) -> None:
        """Put back what ``state()`` gave. Raises ValueError for the state of another run."""


class Generators:
    """The generators of this process that nobody seeds by name: torch's, numpy's and Python's. No part of genalign
    draws from them; rewards of others may."""

    def state(self) -> State:
        """As they are now."""
        version, python, gauss = random.getstate()
        kind, words, *rest = np.random.get_state(legacy=True)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        tensors = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(python),
            "numpy": torch.from_numpy(np.asarray(words, np.int64)),
        }
        numbers = {"python": [version, gauss], "numpy": [kind, *rest]}
        return State(tensors | {f"cuda.{index}": words for index, words in enumerate(cuda)}, numbers)

    def position(self) -> bytes:
        """Another one once any of them has been drawn from."""
        state = self.state()
        words = (tensor.numpy().tobytes() for tensor in state.tensors.values())
        return b"".join([*words, repr(state.numbers).encode()])

    def restore(self, state: State) -> None:
        """To where they were; those of CUDA devices that are not here are left out."""
        version, gauss = state.numbers["python"]
        random.setstate((version, tuple(state.tensors["python"].tolist()), gauss))
        kind, *rest = state.numbers["numpy"]
        np.random.set_state((kind, state.tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state.tensors["torch"])
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in state.tensors:
                torch.cuda.set_rng_state(state.tensors[f"cuda.{index}"], index)


@dataclass(frozen=True)
class OfEach:
    """A part that each of several processes has its own of: the states of all, of which each takes back its own."""

    part: Stateful
    processes: Processes

    def state(self) -> State:
        """Tensors (processes, ...), and the numbers of each process."""
        own = self.part.state()
        tensors = {name: self.processes.gathered(tensor) for name, tensor in own.tensors.items()}
        return State(tensors, {"processes": self.processes.told(own.numbers)})

    def restore(self, state: State) -> None:
        """Put back its own; a process that was not there before is as it is."""
        numbers, rank = state.numbers["processes"], self.processes.rank
        if rank < len(numbers):
            own = {name: tensor[rank].clone() for name, tensor in state.tensors.items()}  # torch takes no views
            self.part.restore(State(own, numbers[rank]))
