"""The C library's allocator, for computing on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
_LARGEST = 2**30  # bytes


def keep_freed_memory() -> bool:
    """Keep what is freed, up to 1 GiB at once, for the next tensors; whether the C library can.

    glibc gives blocks of more than 32 MiB back to the system, which hands them out again page by page, which takes a
    good part of a training's time. The process then holds on to the most that it ever used. Settings in the
    environment (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES) are left as they are.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, _LARGEST) for name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
