"""Distributed runs: work divided over ranks, collectives, and a heartbeat that ends a rank when another has died.

A launcher (`accelerate launch`, torchrun) starts the processes; each runs the same program.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS, SILENCE_SECONDS = 5.0, 45.0
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # for ranks that are alive


class ProcessGroupError(RuntimeError):
    """A collective failed because another rank of the run has ended."""


@dataclass(frozen=True)
class RankShare:
    """The share of one rank in numbered work: the numbers n with ``n % world_size == rank``."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size} processes: ranks are 0 to world_size - 1")

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Self:
        """Read RANK and WORLD_SIZE, which torchrun and accelerate set; without them, one rank has all of the work."""
        if ("RANK" in variables) != ("WORLD_SIZE" in variables):
            raise ValueError("set both RANK and WORLD_SIZE, or neither")
        rank, world_size = variables.get("RANK", "0"), variables.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world_size.isdecimal()):
            raise ValueError(f"RANK and WORLD_SIZE must be whole numbers, not {rank!r} and {world_size!r}")
        return cls(int(rank), int(world_size))

    def indices(self, count: int) -> range:
        """Return this rank's part of the numbers 0..count-1."""
        return range(self.rank, count, self.world_size)

    def padded_indices(self, count: int) -> range:
        """Return this rank's part of the numbers 0..count-1, padded beyond so that every rank has equally many."""
        return range(self.rank, self.rank + -(-count // self.world_size) * self.world_size, self.world_size)


ALL_RANKS = RankShare()
"""All of the work, as one share."""


@dataclass(frozen=True)
class ProcessGroup(RankShare):
    """The ranks of a run and their collectives: every rank calls the method, in the same order, and waits for the last.

    Every collective raises ProcessGroupError if another rank has ended.
    """

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks, of one shape and dtype, to (world_size, ...), on the device of ``tensor``."""
        if self.world_size == 1 or not tensor.numel():
            return torch.stack([tensor.detach()] * self.world_size)
        own = tensor.detach().cpu().contiguous()
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        with _collective():
            dist.all_gather(gathered, own)
        return torch.stack(gathered).to(tensor.device)

    def interleaved(self, own: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Gather batches of rows (B, ...) that the ranks take in turn, and join them in their order.

        Args:
            own: This rank's batches that are not empty.
            sizes: The sizes of the batches of all ranks, of which each rank has at least one that is not empty.
        """
        if self.world_size == 1:
            return torch.cat(list(own))
        rows, like = iter(own), own[0]
        padded = like.new_zeros(-(-len(sizes) // self.world_size), max(sizes), *like.shape[1:])
        for place, number in enumerate(self.indices(len(sizes))):
            if sizes[number]:
                padded[place, : sizes[number]] = next(rows)
        batches = self.all_gather(padded).transpose(0, 1).flatten(0, 1)
        return torch.cat([batch[:size] for batch, size in zip(batches, sizes, strict=False)])

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather one JSON value from each rank."""
        if self.world_size == 1:
            return [value]
        encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes: list[int] = self.all_gather(torch.tensor(len(encoded))).tolist()
        rows = self.all_gather(F.pad(encoded, (0, max(sizes) - len(encoded))))
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait until all ranks have arrived here."""
        self.all_gather_object(None)

    def broadcast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the main rank's named tensors, on the CPU; the tensors of other ranks are ignored."""
        if self.world_size == 1:
            return dict(tensors)
        layout = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
        received: dict[str, Tensor] = {}
        for name, shape, dtype in self.all_gather_object(layout if self.is_main else None)[0]:
            received[name] = (
                tensors[name].detach().cpu().contiguous()
                if self.is_main
                else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            with _collective():
                dist.broadcast(received[name], 0)
        return received

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks."""
        if self.world_size == 1:
            return
        with _collective():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


SINGLE_PROCESS = ProcessGroup()
"""The process group of a run without a launcher."""


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        cause = str(error).split(". ")[0]
        raise ProcessGroupError(
            f"another process of this run has ended: see its own error message ({cause})"
        ) from error


@contextlib.contextmanager
def process_group(
    variables: Mapping[str, str], heartbeat: float = HEARTBEAT_SECONDS, silence: float = SILENCE_SECONDS
) -> Iterator[ProcessGroup]:
    """Join the process group of a launcher's environment ``variables``, or yield SINGLE_PROCESS without a launcher.

    Each rank sends a heartbeat every ``heartbeat`` seconds. A rank that misses another's heartbeat for ``silence``
    seconds prints so and exits at once: a collective with a killed rank may otherwise never return.
    """
    share = RankShare.from_environment(variables)
    if share.world_size == 1:
        if "ACCELERATE_USE_CPU" in variables and "MASTER_ADDR" in variables and "RANK" not in variables:
            logger.warning(
                "accelerate starts a single process on a CPU, whatever its configuration: use torchrun instead"
            )
        yield SINGLE_PROCESS
        return
    take_own_device(variables)
    _rendezvous(share, variables)
    processes, ended = ProcessGroup(share.rank, share.world_size), threading.Event()
    # The heartbeat has its own connection to the store of the rendezvous
    untyped: Any = dist  # torch does not type its stores
    tcp = untyped.TCPStore(
        variables["MASTER_ADDR"],
        int(variables["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=SILENCE_SECONDS),
    )
    store = untyped.PrefixStore("genalign/alive", tcp)
    store.set(str(share.rank), "0")
    processes.barrier()  # then every rank has a counter
    watching = (processes, store, heartbeat, silence, ended)
    thread = threading.Thread(target=_heartbeat, args=watching, name="genalign-heartbeat", daemon=True)
    thread.start()
    yield processes
    processes.barrier()  # skipped after an error: the other ranks must notice that this one has ended
    ended.set()
    thread.join()
    dist.destroy_process_group()


def _rendezvous(share: RankShare, variables: Mapping[str, str]) -> None:
    """Wait until all ranks of a launcher's environment have met. Raises ProcessGroupError if one does not come."""
    place = f"{variables.get('MASTER_ADDR')}:{variables.get('MASTER_PORT')}"
    logger.info("process %d waits for all %d processes at %s", share.rank, share.world_size, place)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    except dist.DistError as error:
        raise ProcessGroupError(
            f"not all {share.world_size} processes came to {place} within {_COLLECTIVE_TIMEOUT}: start each of them"
            " with this MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE for a single process"
            f" ({str(error).splitlines()[0]})"
        ) from error


def own_device(name: str, variables: Mapping[str, str] = os.environ) -> torch.device:
    """Return the device ``name``, with the index of this process's GPU for "cuda": another thread has another default.

    Raises ValueError for an index under a launcher, which would put all of its processes on one GPU.
    """
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None and "LOCAL_RANK" in variables:
        raise ValueError(
            f"model.device {name} puts every process of the launcher on one GPU: set model.device to cuda, which is"
            " each process's own"
        )
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def current_gpu() -> int | None:
    """Return the index of this thread's CUDA device, for ``use_gpu`` in another thread; None without CUDA."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def use_gpu(index: int | None) -> None:
    """Make "cuda" mean the device ``index`` in this thread: a new thread begins on device 0, whoever started it."""
    if index is not None:
        torch.cuda.set_device(index)


def take_own_device(variables: Mapping[str, str]) -> None:
    """Make "cuda" mean this process's own GPU if a launcher has set LOCAL_RANK."""
    if "LOCAL_RANK" in variables and torch.cuda.is_available():
        torch.cuda.set_device(int(variables["LOCAL_RANK"]))


def _heartbeat(processes: ProcessGroup, store: Any, interval: float, silence: float, ended: threading.Event) -> None:
    """Raise this rank's counter in the store and check the others until the run has ended; exit if a rank is dead."""
    last = dict.fromkeys(range(processes.world_size), (b"", time.monotonic()))  # each rank's counter, and when it rose
    for count in itertools.count(1):
        if ended.wait(interval):
            return
        try:
            store.set(str(processes.rank), str(count))
            now = time.monotonic()
            for rank, (seen, _) in last.items():
                if (counter := store.get(str(rank))) != seen:
                    last[rank] = counter, now
            dead = [rank for rank, (_, rose) in last.items() if now - rose > silence]
        except RuntimeError:  # the store ended together with rank 0, whose process holds it
            dead = [] if ended.wait(interval) else [0]
        if dead:
            print(
                f"error: process {dead[0]} of {processes.world_size} has been silent for {silence:.0f} s:"
                f" process {processes.rank} ends, too",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
