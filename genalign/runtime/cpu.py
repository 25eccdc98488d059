"""What makes computing on a CPU faster: the C library's allocator, and the kernel of attention."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """Attention without the flash kernel, on a CPU; elsewhere nothing changes. In bfloat16 that kernel's gradient takes
    half of a training step of transformers with small heads; with heads of 64 either is as fast."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
