"""Several processes that work as one: which part of the work is whose, what they tell each other, and that none waits
for one that has ended. A launcher starts them (`accelerate launch`, torchrun); each runs the same program.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)
BEAT, SILENCE = 5.0, 45.0  # seconds between two signs of life, and until a process is taken for dead
_END = timedelta(minutes=30)  # of a wait for processes that are alive


class ProcessesError(RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Share:
    """Which numbers are this process's: those that leave ``rank`` when divided by ``processes``."""

    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.processes:
            raise ValueError(f"rank {self.rank} of {self.processes} processes: ranks are 0 to processes - 1")

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Self:
        """By RANK and WORLD_SIZE, which torchrun and accelerate set; all of the work where they are absent."""
        if ("RANK" in variables) != ("WORLD_SIZE" in variables):
            raise ValueError("set both RANK and WORLD_SIZE, or neither")
        return cls(int(variables.get("RANK", 0)), int(variables.get("WORLD_SIZE", 1)))

    def of(self, count: int) -> range:
        """Its part of the numbers 0..count-1."""
        return range(self.rank, count, self.processes)

    def in_step(self, count: int) -> range:
        """Its part of the numbers 0..count-1 and as many beyond as give every process equally many."""
        return range(self.rank, self.rank + -(-count // self.processes) * self.processes, self.processes)


ALL = Share()
"""The whole of the work."""


@dataclass(frozen=True)
class Processes(Share):
    """A share whose processes talk. What they tell each other is a collective: all of them call the method, in the same
    order, and wait for the last. Raises ProcessesError where one of them has ended.
    """

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def gathered(self, tensor: Tensor) -> Tensor:
        """(processes, ...) what each of them has, of one shape and dtype; where ``tensor`` is."""
        if self.processes == 1 or not tensor.numel():
            return torch.stack([tensor.detach()] * self.processes)
        own = tensor.detach().cpu().contiguous()
        found = [torch.empty_like(own) for _ in range(self.processes)]
        with _collective():
            dist.all_gather(found, own)
        return torch.stack(found).to(tensor.device)

    def interleaved(self, own: Tensor, size: int) -> Tensor:
        """Rows (B, ...) of all processes, in the order of the batches of ``size`` rows that they take in turn."""
        shape = own.shape[1:]
        batches = self.gathered(own).reshape(self.processes, len(own) // size, size, *shape)
        return batches.transpose(0, 1).reshape(-1, *shape)

    def told(self, value: Any) -> list[Any]:
        """What each of them says, by way of JSON."""
        if self.processes == 1:
            return [value]
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes: list[int] = self.gathered(torch.tensor(len(said))).tolist()
        rows = self.gathered(F.pad(said, (0, max(sizes) - len(said))))
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        return any(self.told(flag))

    def wait(self) -> None:
        """Until all are here."""
        self.told(None)

    def from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named tensors of the first process, on the CPU; those of the others are not looked at."""
        if self.processes == 1:
            return dict(tensors)
        named = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
        found: dict[str, Tensor] = {}
        for name, shape, dtype in self.told(named if self.first else None)[0]:
            found[name] = (
                tensors[name].detach().cpu().contiguous()
                if self.first
                else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            with _collective():
                dist.broadcast(found[name], 0)
        return found

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, where it is."""
        if self.processes == 1:
            return
        with _collective():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


ALONE = Processes()
"""The one process of a run without a launcher."""


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        cause = str(error).split(". ")[0]
        raise ProcessesError(f"another process of this run has ended, see what it said itself ({cause})") from error


@contextlib.contextmanager
def joined(variables: Mapping[str, str], beat: float = BEAT, silence: float = SILENCE) -> Iterator[Processes]:
    """The processes that a launcher started with ``variables`` of the environment, once all are there; ALONE without.

    Each gives a sign of life every ``beat`` seconds. One that hears nothing of another for ``silence`` seconds says so
    and ends at once, whatever it is doing: a wait for a process that was killed may not end by itself.
    """
    share = Share.from_environment(variables)
    if share.processes == 1:
        if "ACCELERATE_USE_CPU" in variables and "MASTER_ADDR" in variables and "RANK" not in variables:
            logger.warning(
                "accelerate starts one process on a CPU, however many it is asked for: start them by torchrun"
            )
        yield ALONE
        return
    take_own_device(variables)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_END)
    processes, ended = Processes(share.rank, share.processes), threading.Event()
    heart = _Heart(processes, _store(variables), silence)
    heart.beat()
    processes.wait()
    watch = threading.Thread(target=heart.watch, args=(beat, ended), name="genalign-heart", daemon=True)
    watch.start()
    yield processes
    processes.wait()  # not where it was left by an error: the others are to see that this process has ended
    ended.set()
    watch.join()
    dist.destroy_process_group()


def take_own_device(variables: Mapping[str, str]) -> None:
    """Let "cuda" mean this process's own GPU, where a launcher has numbered the processes of a machine."""
    if "LOCAL_RANK" in variables and torch.cuda.is_available():
        torch.cuda.set_device(int(variables["LOCAL_RANK"]))


class _Store(Protocol):
    """What is used of torch's."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


def _store(variables: Mapping[str, str]) -> _Store:
    """A connection of its own to where the processes met."""
    host, port, patience = variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), timedelta(seconds=SILENCE)
    torchs: Any = dist  # whose stores it does not type
    store = torchs.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
    found: _Store = torchs.PrefixStore("genalign/alive", store)
    return found


class _Heart:
    """Signs of life, in a store that all processes see: a number each, which rises."""

    def __init__(self, processes: Processes, store: _Store, silence: float) -> None:
        self.processes, self.store, self.silence = processes, store, silence
        self.beats = 0
        self.last = dict.fromkeys(range(processes.processes), (b"", time.monotonic()))

    def beat(self) -> None:
        """Give one."""
        self.beats += 1
        self.store.set(str(self.processes.rank), str(self.beats))

    def silent(self) -> list[int]:
        """Who has given none for too long."""
        now = time.monotonic()
        for rank, (seen, _) in self.last.items():
            beats = self.store.get(str(rank))
            if beats != seen:
                self.last[rank] = beats, now
        return [rank for rank, (_, when) in self.last.items() if now - when > self.silence]

    def watch(self, beat: float, ended: threading.Event) -> None:
        """Until the run has ended; end the process where another one is dead."""
        while not ended.wait(beat):
            try:
                self.beat()
                dead = self.silent()
            except RuntimeError:  # the store went with the process that kept it
                dead = [] if ended.wait(beat) else [0]
            if dead:
                told = f"process {dead[0]} of {self.processes.processes} has been silent for {self.silence:.0f} s"
                print(f"error: {told}: process {self.processes.rank} ends, too", file=sys.stderr, flush=True)
                os._exit(1)
