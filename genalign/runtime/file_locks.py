"""Pieces of work that several processes take from one folder: by locks, which the system takes back from a process that
is killed."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Claims:
    """Advisory locks (flock) on empty files in ``folder``. Where a shared file system has none between machines, the
    ranks of its processes keep them apart."""

    folder: Path

    @contextlib.contextmanager
    def claimed(self, index: int) -> Iterator[bool]:
        """Hold a piece for as long as this process works on it; False where another one does. A kill lets it go."""
        with _locked(self.folder / f"{index:05d}", wait=False) as held:
            yield held

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process is in such a part: what is about the whole work is written in one."""
        with _locked(self.folder / "all", wait=True):
            yield


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock of a file, which is opened for writing, as network file systems want it for a
    lock that excludes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        yield _lock(file, wait)


def _lock(file: IO[str], wait: bool) -> bool:
    """False where another process holds it and there is no waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
