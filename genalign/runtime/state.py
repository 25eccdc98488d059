"""State that a resumed run restores: of stateful parts, the global random generators, and optimizers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from genalign.runtime.distributed import ProcessGroup
from genalign.runtime.fsdp import gathered, shard_like


@dataclass(frozen=True)
class State:
    """A state to save: ``tensors`` by name, and ``numbers``, any JSON values by name."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


class Stateful(Protocol):
    """A part of a run that later rounds depend on."""

    def state(self) -> State:
        """Return the complete state between two rounds."""

    def restore(self, state: State) -> None:
        """Restore a result of ``state()``. Raises ValueError for the state of another run."""


class Generators:
    """The global random generators of torch, numpy and Python. genalign never draws from them; users' rewards may."""

    def state(self) -> State:
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
        """Return bytes that differ after any draw from any of the generators."""
        state = self.state()
        words = (tensor.numpy().tobytes() for tensor in state.tensors.values())
        return b"".join([*words, repr(state.numbers).encode()])

    def restore(self, state: State) -> None:
        """Restore all generators; states of CUDA devices that this machine lacks are ignored."""
        version, gauss = state.numbers["python"]
        random.setstate((version, tuple(state.tensors["python"].tolist()), gauss))
        kind, *rest = state.numbers["numpy"]
        np.random.set_state((kind, state.tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state.tensors["torch"])
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in state.tensors:
                torch.cuda.set_rng_state(state.tensors[f"cuda.{index}"], index)


@dataclass(frozen=True)
class PerRankState:
    """A part with one state per rank: saves the states of all ranks, restores each rank's own."""

    part: Stateful
    processes: ProcessGroup

    def state(self) -> State:
        """Return tensors (world_size, ...) and a list of the numbers of each rank."""
        own = self.part.state()
        tensors = {name: self.processes.all_gather(tensor) for name, tensor in own.tensors.items()}
        return State(tensors, {"processes": self.processes.all_gather_object(own.numbers)})

    def restore(self, state: State) -> None:
        """Restore this rank's state; a rank beyond the saved ones is left as it is."""
        numbers, rank = state.numbers["processes"], self.processes.rank
        if rank < len(numbers):
            own = {name: tensor[rank].clone() for name, tensor in state.tensors.items()}  # torch takes no views
            self.part.restore(State(own, numbers[rank]))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter slots, gathered on rank 0, as ``"<parameter index>.<slot>"``.

    Nested slots get one more dotted part. Hyperparameters are not included.
    """
    return {name: gathered(torch.as_tensor(value)) for name, value in _flat(optimizer.state_dict()["state"])}


def _flat(slots: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in slots.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", value


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the slots that ``optimizer_tensors`` returned."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        index, *inner, slot = name.split(".")
        slots = state.setdefault(int(index), {})
        for key in inner:
            slots = slots.setdefault(key, {})
        slots[slot] = shard_like(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
