"""Locks by which several processes share the pieces of work of one folder; a killed process loses its locks."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Claims:
    """Advisory locks (flock) on empty files in ``folder``.

    On a shared file system without locks between machines the work is divided by rank instead.
    """

    folder: Path

    @contextlib.contextmanager
    def try_claim(self, index: int) -> Iterator[bool]:
        """Lock piece ``index`` of the work inside the context; yield False if another process has it."""
        with _locked(self.folder / f"{index:05d}", wait=False) as acquired:
            yield acquired

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the lock of the whole folder, and hold it inside the context."""
        with _locked(self.folder / "all", wait=True):
            yield


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Yield whether this process holds the lock of a file, opened for writing as network file systems require it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            acquired = True
        except BlockingIOError:
            acquired = False
        yield acquired
