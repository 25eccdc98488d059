"""Statistics of images of any content, which shift when a model exploits a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genalign.types import Prompt

_TINY = 1e-6
_BACKGROUND = 0.1  # largest distance of a pixel of the background from its color


def saturation(images: Tensor) -> Tensor:
    """Compute the mean over pixels of the largest minus the smallest channel, (B,) in [0, 1], for (B, 3, H, W)."""
    return (images.amax(1) - images.amin(1)).flatten(1).mean(1)


def brightness(images: Tensor) -> Tensor:
    """Compute the mean (B,) over pixels and channels, in [0, 1], for (B, 3, H, W)."""
    return images.flatten(1).mean(1)


def contrast(images: Tensor) -> Tensor:
    """Compute the standard deviation (B,) over pixels of gray, the mean of the channels, for (B, 3, H, W)."""
    return images.mean(1).flatten(1).std(1, correction=0)


def object_area(images: Tensor) -> Tensor:
    """Compute the fraction (B,) of pixels that are no background, for (B, 3, H, W) in [0, 1].

    The background has the color of the border, its median by channel: a pixel is of it if no channel is over 0.1 off.
    It is the area of objects on a plain ground, and says little of other images. NaN for an image that is not finite.
    """
    edges = images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]
    color = torch.cat(edges, dim=2).median(2).values[:, :, None, None]
    area = ((images - color).abs().amax(1) > _BACKGROUND).float().flatten(1).mean(1)
    return area.masked_fill(~images.isfinite().flatten(1).all(1), torch.nan)


def high_frequency(images: Tensor) -> Tensor:
    """Compute the log (B,) of the fraction of the gray image's power above a quarter of a cycle per pixel.

    Noise, ringing and over-sharpening raise it, blur lowers it.
    """
    gray = images.float().mean(1)
    power = torch.fft.fft2(gray - gray.mean((1, 2), keepdim=True)).abs().square()
    vertical, horizontal = (torch.fft.fftfreq(size, device=images.device) for size in gray.shape[1:])
    high = (vertical[:, None].square() + horizontal.square()).sqrt() > 0.25
    share: Tensor = (power[:, high].sum(1) + _TINY) / (power.sum((1, 2)) + _TINY)
    return share.log()


def grid_energy(images: Tensor, period: int = 8) -> Tensor:
    """Compute the log (B,) of the mean pixel step at multiples of ``period`` over the mean pixel step elsewhere.

    Autoencoders and patches of 8 or 16 pixels leave a grid there when a model is driven out of their range.
    """
    images = images.float()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 3))
    right = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2))
    ratios = []
    for steps in (down, right):  # (B, n) between neighbors
        edge = torch.arange(1, steps.shape[1] + 1, device=steps.device) % period == 0
        if not bool(edge.any()):
            raise ValueError(f"images of {steps.shape[1] + 1} pixels have no edge of blocks of {period}")
        ratios.append((steps[:, edge].mean(1) + _TINY) / (steps[:, ~edge].mean(1) + _TINY))
    return torch.stack(ratios).mean(0).log()


def photometric_variety(images: Tensor, prompts: Sequence[Prompt] = ()) -> float:
    """Sum the standard deviations over images (B, 3, H, W) of their saturation, brightness and contrast (ddof 0).

    They are the means over pixels of HSV's saturation and value, and the standard deviation of gray, the mean of the
    channels: in the form of DivGenBench's PVS (D2-Align, arXiv 2512.24146), whose gray is not stated. It falls where
    all images take on one look. A diagnostic of the reward-hacking monitor; ``prompts`` are not read.
    """
    pixels = images.double()
    value, chroma = pixels.amax(1), pixels.amax(1) - pixels.amin(1)
    saturation = torch.where(value > 0, chroma / value.clamp(min=1e-12), 0.0)
    contrast = pixels.mean(1).flatten(1).std(1, correction=0)
    figures = torch.stack([saturation.flatten(1).mean(1), value.flatten(1).mean(1), contrast])
    return float(figures.std(1, correction=0).sum())
