"""Faster computing on a CPU: the allocator of the C library, and the backward pass of attention."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from functools import cache

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
_LARGEST = 2**30  # bytes
_SCORES_AT_ONCE = 2**18  # attention scores whose chain of operations stays in the cache of a core


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


@cache
def use_faster_attention_backward() -> torch.library.Library:
    """Replace the backward pass of torch's fused attention on CPUs, for the whole process.

    In bfloat16, torch's own takes a third of a training step of a small transformer. This one multiplies matrices of a
    few heads at a time, and computes the same gradients up to rounding. The forward pass stays torch's.
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch has not typed it
    operator = "_scaled_dot_product_flash_attention_for_cpu_backward"
    library.impl(operator, attention_backward, "CPU")  # type: ignore[no-untyped-call]  # as above
    return library


def attention_backward(  # noqa: PLR0913  # the arguments of the operator
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of attention by FlashAttention's formulas (arXiv 2205.14135, appendix B.2).

    Args:
        grad_output: Gradient (B, H, N, d) of the output.
        query: Queries (B, H, N, d).
        key: Keys (B, K, M, d) of K heads, each of which H / K consecutive heads of the queries share.
        value: Values (B, K, M, d).
        output: Output (B, H, N, d) of the forward pass.
        logsumexp: Log of the sums (B, H, N) of the exponentials of the scores; the weights are recomputed.
        dropout_p: Dropout, which the forward pass does not offer on CPUs.
        is_causal: Whether a query sees only keys up to its own place.
        attn_mask: Numbers added to the scores, which broadcast to (B, H, N, M).
        scale: Factor of the scores; None is 1 / sqrt(d).

    Returns:
        The gradients of query, key and value.
    """
    batch, heads, length, width = query.shape
    scores_shape = batch, heads, length, key.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if is_causal:
        attn_mask = torch.full(scores_shape[2:], -torch.inf, dtype=query.dtype).triu(1)
    mask = None if attn_mask is None else attn_mask.expand(scores_shape).flatten(0, 1)
    shared = heads // key.shape[1]
    keys, values = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
    flat = [tensor.flatten(0, 1) for tensor in (query, keys, values, grad_output, output)]
    precise = torch.promote_types(
        query.dtype, torch.float32
    )  # of scores, whose rounding weights grow exponentially with
    gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in flat[:3]]
    size = max(1, _SCORES_AT_ONCE // (length * key.shape[2]))
    for start in range(0, batch * heads, size):
        part = slice(start, start + size)
        q, k, v, grad, out = (tensor[part] for tensor in flat)
        scores = torch.bmm(q.to(precise) * scale, k.to(precise).transpose(1, 2))
        weights = torch.softmax(scores if mask is None else scores.add_(mask[part]), -1)
        mean = (grad.to(precise) * out).sum(-1, keepdim=True)
        slope = torch.bmm(grad.to(precise), v.to(precise).transpose(1, 2)).sub_(mean).mul_(weights).mul_(scale)
        slope = slope.to(q.dtype)
        torch.bmm(slope, k, out=gradients[0][part])
        torch.bmm(slope.transpose(1, 2), q, out=gradients[1][part])
        torch.bmm(weights.to(q.dtype).transpose(1, 2), grad, out=gradients[2][part])
    query_gradient, *others = (x.view(batch, heads, *x.shape[1:]) for x in gradients)
    key_gradient, value_gradient = (x.view(batch, -1, shared, *x.shape[2:]).sum(2) if shared > 1 else x for x in others)
    return _heads_last(query_gradient), _heads_last(key_gradient), _heads_last(value_gradient)


def _heads_last(gradient: Tensor) -> Tensor:
    """Return the same (B, H, N, d), in memory as (B, N, H, d): torch.compile plans with the strides of torch's own."""
    return gradient.transpose(1, 2).contiguous().transpose(1, 2)
