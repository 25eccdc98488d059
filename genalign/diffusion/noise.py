"""Seeds derived from names, and noise from seeds: the same on every machine, in every batch and on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """Hash the parts of a name to a seed below 2**63."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8]) >> 1


def seeded_uniform(seeds: Sequence[int]) -> Tensor:
    """Return a number in [0, 1) for each seed below 2**63, such as ``derived_seed`` makes, (B,) float64."""
    return torch.tensor([seed / 2**63 for seed in seeds], dtype=torch.float64)


def seeded_noise(seeds: Sequence[int], like: Tensor) -> Tensor:
    """Draw standard normal noise (B, ...) from one seed per sample, on the CPU in float32, then cast as ``like``."""
    drawn = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(like.device, like.dtype, non_blocking=True)
