"""Faster computing on a CPU: the allocator of the C library, and the attention kernel."""

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


def retain_freed_memory() -> bool:
    """Make malloc retain freed blocks up to 1 GiB for the next tensors; return whether the C library supports it.

    By default glibc returns blocks of more than 32 MiB to the system, and gets them back page by page, which takes a
    good part of the training time. With this the process retains its peak memory. Settings in the
    environment (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES) are left as they are.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, _LARGEST) for name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """Use attention without the flash kernel on a CPU; a null context on other devices.

    In bfloat16 the flash kernel's backward pass takes half of a training step of transformers with small heads; with
    heads of 64 both are as fast.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
