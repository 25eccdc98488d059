"""What pictures look like, whatever they show: statistics that a reward which is being exploited drags along."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-6


def saturation(images: Tensor) -> Tensor:
    """The mean over pixels of the largest less the smallest channel, (B,) in [0, 1], of images (B, 3, H, W)."""
    return (images.amax(1) - images.amin(1)).flatten(1).mean(1)


def high_frequency(images: Tensor) -> Tensor:
    """The logarithm (B,) of the share that frequencies above a quarter of a cycle per pixel have of the grey image's
    power: what noise, ringing and over-sharpening raise, and blur lowers."""
    grey = images.float().mean(1)
    power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square()
    vertical, horizontal = (torch.fft.fftfreq(size, device=images.device) for size in grey.shape[1:])
    high = (vertical[:, None].square() + horizontal.square()).sqrt() > 0.25
    share: Tensor = (power[:, high].sum(1) + _TINY) / (power.sum((1, 2)) + _TINY)
    return share.log()


def grid_energy(images: Tensor, period: int = 8) -> Tensor:
    """The logarithm (B,) of the mean step between neighbouring pixels at multiples of ``period`` over that elsewhere.

    Autoencoders and patches of 8 or 16 pixels leave a grid there when a model is driven out of their range.
    """
    found = images.float()
    down = (found[..., 1:, :] - found[..., :-1, :]).abs().mean((1, 3))
    right = (found[..., 1:] - found[..., :-1]).abs().mean((1, 2))
    ratios = [_at_multiples(steps, period) for steps in (down, right)]
    return torch.stack(ratios).mean(0).log()


def _at_multiples(steps: Tensor, period: int) -> Tensor:
    """Mean steps (B,) at block edges over those within blocks; ``steps`` (B, n) lie between neighbours."""
    edge = torch.arange(1, steps.shape[1] + 1, device=steps.device) % period == 0
    if not bool(edge.any()):
        raise ValueError(f"images of {steps.shape[1] + 1} pixels have no edge of blocks of {period}")
    return (steps[:, edge].mean(1) + _TINY) / (steps[:, ~edge].mean(1) + _TINY)
