"""Atomic writes of text, JSON and tensors (to a temporary file, then renamed; no pickle), and locks on files."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems without flock
_UNNOTICED, _LONGEST = 2, 600  # seconds to wait for a lock without a word, and at most


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ValueError for NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def without_infinities(value: Any) -> Any:
    """Replace the numbers in nested mappings and sequences that are not finite, which JSON has not, by None."""
    if isinstance(value, Mapping):
        return {name: without_infinities(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write named tensors and JSON values ``meta`` into one safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with disk_errors():
        save_file(contiguous, temporary, metadata={"meta": json.dumps(dict(meta))})
    apply_umask(temporary)
    os.replace(temporary, path)


def apply_umask(path: Path) -> None:
    """Give a file, or all files below a folder, the permissions of a new file: 0644 under the usual umask.

    safetensors writes 0600, so neither colleagues nor servers could read the weights.
    """
    folder = path if path.is_dir() else path.parent
    probe = folder / f".permissions-{uuid.uuid4().hex}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a failed write of a safetensors file into an OSError, such as for a full disk."""
    try:
        yield
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        raise OSError(int(match[1]) if match else errno.EIO, str(error)) from error


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and ``meta`` that ``save_state`` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        meta = json.loads((file.metadata() or {}).get("meta", "{}"))
    return tensors, meta


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add ``prefix`` to the names of tensors."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names start with ``prefix``, and remove it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Claims:
    """Locks by which processes share the pieces of work of one folder: locked files in ``folder``.

    A killed process loses its locks. Where the file system cannot lock a file, one that exists is the lock, and names
    the process that holds it; on a shared one the work is best divided by rank instead.
    """

    folder: Path

    def try_claim(self, index: int) -> AbstractContextManager[bool]:
        """Lock piece ``index`` of the work inside the context; yield False if another process has it."""
        return _locked(self.folder / f"{index:05d}", 0)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the lock of the whole folder, and hold it inside the context.

        Raises TimeoutError if another process does not let go of it for ten minutes.
        """
        path = self.folder / "all"
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(_locked(path, _UNNOTICED)):
                logger.info("waiting for another process, which holds %s", path)
                if not stack.enter_context(_locked(path, _LONGEST)):
                    raise TimeoutError(f"{path} is held by another process, for {_LONGEST} s by now: end it first")
            yield


@contextlib.contextmanager
def _locked(path: Path, seconds: float) -> Iterator[bool]:
    """Yield whether this process holds the lock of a file, for which it waits at most so many seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        held = _acquired(lock, seconds)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lock = SoftFileLock(path.with_name(f"{path.name}.lock"))
        held = _acquired(lock, seconds)
    try:
        yield held
    finally:
        lock.release()


def _acquired(lock: BaseFileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True
