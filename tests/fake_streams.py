"""CUDA streams that only log what is asked of them, for tests of the order of two threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor


class OnGpu(Tensor):
    """A tensor on the CPU that says that it is on a GPU, and logs ``record_stream``."""

    is_cuda = True  # type: ignore[assignment]  # a property of Tensor
    streams: FakeStreams

    def record_stream(self, stream: Any) -> None:
        self.streams.log.append(f"memory in use by {stream.name}")


@dataclass
class Stream:
    name: str
    streams: FakeStreams
    events: int = 0

    def record_event(self) -> str:
        self.events += 1
        self.streams.log.append(f"{self.name} {self.events} recorded")
        return f"{self.name} {self.events}"

    def wait_event(self, event: str) -> None:
        self.streams.log.append(f"{self.name} waits for {event}")


@dataclass
class FakeStreams:
    """The streams of a machine with several GPUs by thread, "main" at first, and what was asked of them in order."""

    log: list[str] = field(default_factory=list)
    devices: dict[int, int] = field(default_factory=dict)
    current: dict[int, Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.main = Stream("main", self)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = threading.get_ident
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # as on a GPU, for good
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.devices.get(own(), 0))
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: self.devices.update({own(): index}))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("side", self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current.get(own(), self.main))
        monkeypatch.setattr(torch.cuda, "stream", self.using)

    @contextlib.contextmanager
    def using(self, stream: Stream | None) -> Iterator[None]:
        if stream is not None:
            self.current[threading.get_ident()] = stream
        yield

    def tensor(self, *shape: int) -> OnGpu:
        tensor = torch.zeros(*shape).as_subclass(OnGpu)
        tensor.streams = self
        return tensor


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    fake = FakeStreams()
    fake.install(monkeypatch)
    return fake
