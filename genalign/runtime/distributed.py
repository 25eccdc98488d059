"""Distributed runs: work divided over ranks, collectives, and a heartbeat that ends a rank when another has died.

A launcher (`accelerate launch`, torchrun) starts the processes; each runs the same program.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 5.0
HEARTBEAT_TIMEOUT = "GENALIGN_HEARTBEAT_TIMEOUT"
"""The environment variable with the seconds without a heartbeat after which a rank counts as dead; by default 45."""
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # for ranks that are alive
_VISIBLE_WITHIN = 30.0  # seconds, for a new file on a network file system
_BUCKET = 2**24  # numbers that are reduced at once


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


ALL_RANKS = RankShare()
"""All of the work, as one share."""


@dataclass(frozen=True)
class ProcessGroup(RankShare):
    """The ranks of a run and their collectives: every rank calls the method, in the same order, and waits for the last.

    Every collective raises ProcessGroupError if another rank has ended. ``in_step`` says that the ranks must run their
    network equally often, because it is sharded over them.
    """

    in_step: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def batch_numbers(self, count: int) -> range:
        """Return this rank's part of the numbers 0..count-1; in step, padded so that every rank has equally many."""
        last = -(-count // self.world_size) * self.world_size if self.in_step else count
        return range(self.rank, last, self.world_size)

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
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                dist.all_reduce(flat)
                totals = torch.split(flat, [tensor.numel() for tensor in bucket])
                for tensor, total in zip(bucket, totals, strict=True):
                    tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide tensors into parts of one dtype and of 64 MB or one tensor: a network has hundreds of small ones."""
    for _, same in itertools.groupby(tensors, lambda tensor: tensor.dtype):
        bucket, size = list[Tensor](), 0
        for tensor in same:
            if bucket and size + tensor.numel() > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.numel()
        yield bucket


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
    variables: Mapping[str, str], heartbeat: float = HEARTBEAT_SECONDS, silence: float | None = None
) -> Iterator[ProcessGroup]:
    """Join the process group of a launcher's environment ``variables``, or yield SINGLE_PROCESS without a launcher.

    Each rank sends a heartbeat every ``heartbeat`` seconds. A rank that misses another's heartbeat for ``silence``
    seconds (by default what HEARTBEAT_TIMEOUT says) prints so and exits at once: a collective with a killed rank may
    otherwise never return. Raises ValueError for an environment in which the ranks cannot meet.
    """
    silence = heartbeat_timeout(variables) if silence is None else silence
    share = RankShare.from_environment(variables)
    if share.world_size == 1:
        if "ACCELERATE_USE_CPU" in variables and "MASTER_ADDR" in variables and "RANK" not in variables:
            logger.warning(
                "accelerate starts a single process on a CPU, whatever its configuration: use torchrun instead"
            )
        yield SINGLE_PROCESS
        return
    take_own_device(variables)
    require_address(variables)
    _rendezvous(share, variables)
    processes, ended = ProcessGroup(share.rank, share.world_size), threading.Event()
    # The heartbeat has its own connection to the store of the rendezvous
    untyped: Any = dist  # torch does not type its stores
    tcp = untyped.TCPStore(
        variables["MASTER_ADDR"],
        int(variables["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=silence),
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
    backend, gpu = "gloo", current_gpu()
    options: dict[str, Any] = {}
    if gpu is not None:  # NCCL connects at once, on the device that is this process's own
        backend, options = "cpu:gloo,cuda:nccl", {"device_id": torch.device("cuda", gpu)}
    try:
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT, **options)
    except dist.DistError as error:
        raise ProcessGroupError(
            f"not all {share.world_size} processes came to {place} within {_COLLECTIVE_TIMEOUT}: start each of them"
            " with this MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE for a single process"
            f" ({str(error).splitlines()[0]})"
        ) from error


def heartbeat_timeout(variables: Mapping[str, str]) -> float:
    """Read HEARTBEAT_TIMEOUT. Raises ValueError for less than two heartbeats."""
    value = variables.get(HEARTBEAT_TIMEOUT, "45")
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 2 * HEARTBEAT_SECONDS <= seconds < math.inf:
        raise ValueError(
            f"{HEARTBEAT_TIMEOUT} is {value!r}: give a number of seconds, at least {2 * HEARTBEAT_SECONDS:.0f}"
        )
    return seconds


def require_address(variables: Mapping[str, str]) -> None:
    """Raise ValueError if ranks on several nodes would tell each other the address 127.0.0.1 or the like.

    gloo takes the address of the host's name unless GLOO_SOCKET_IFNAME names a network interface.
    """
    world_size, local = variables.get("WORLD_SIZE", "1"), variables.get("LOCAL_WORLD_SIZE")
    if local in (None, world_size) or "GLOO_SOCKET_IFNAME" in variables:
        return
    try:
        addresses = {str(address[4][0]) for address in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        addresses = set()
    if all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        names = [name for _, name in socket.if_nameindex() if name != "lo"]
        raise ValueError(
            f"the host name {socket.gethostname()} of this node stands for {min(addresses, default='no address')},"
            " where other nodes cannot reach it: set GLOO_SOCKET_IFNAME, on every node, to its network interface"
            f" (here {', '.join(names) or 'none'})"
        )


def require_shared(folder: Path, processes: ProcessGroup) -> None:
    """Raise ValueError on every rank if one does not see a file that rank 0 writes in ``folder``."""
    if processes.world_size == 1:
        return
    token, is_new = folder / f".shared-{os.urandom(8).hex()}", False
    if processes.is_main:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    token = folder / processes.all_gather_object(token.name)[0]
    end = time.monotonic() + _VISIBLE_WITHIN
    while not (sees := token.exists()) and time.monotonic() < end:
        time.sleep(0.5)
    blind = [name for name in processes.all_gather_object(None if sees else socket.gethostname()) if name]
    if processes.is_main:
        token.unlink(missing_ok=True)
        if blind and is_new:
            folder.rmdir()
    if blind:
        raise ValueError(
            f"{folder} is not shared: {len(blind)} of {processes.world_size} processes do not see the files of process"
            f" 0 there, the first on {blind[0]}: choose an output on a file system that all nodes mount"
        )


def own_device(name: str, variables: Mapping[str, str] = os.environ) -> torch.device:
    """Return the device ``name``, with the index of this process's GPU for "cuda": another thread has another default.

    From then on, float32 is multiplied as TF32 on CUDA devices.

    Raises ValueError for an index under a launcher, which would put all of its processes on one GPU.
    """
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None and "LOCAL_RANK" in variables:
        raise ValueError(
            f"model.device {name} puts every process of the launcher on one GPU: set model.device to cuda, which is"
            " each process's own"
        )
    if device.type == "cuda":
        allow_tf32()
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def allow_tf32() -> None:
    """Multiply float32 on CUDA devices by tensor cores, which round its factors to the 10 bits of TF32."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def current_gpu() -> int | None:
    """Return the index of this thread's CUDA device, for ``use_gpu`` in another thread; None without CUDA."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def use_gpu(index: int | None) -> None:
    """Make "cuda" mean the device ``index`` in this thread: a new thread begins on device 0, whoever started it."""
    if index is not None:
        torch.cuda.set_device(index)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's global generators from ``seed`` on within the context, and restore them."""
    gpu = current_gpu()
    with torch.random.fork_rng(devices=[] if gpu is None else [gpu]):  # by default those of all GPUs, with a warning
        torch.manual_seed(seed)
        yield


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
            counters, now = store.multi_get([str(rank) for rank in last]), time.monotonic()  # in one request
            for (rank, (seen, _)), counter in zip(last.items(), counters, strict=True):
                if counter != seen:
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
