"""Decoding of a diffusers pipeline's latents to samples, family by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AceStepPipeline, DiffusionPipeline, FluxPipeline, StableAudioPipeline
from torch import Tensor

from pipelines.ace_step import normalize_peak

Decode = Callable[[Tensor], Tensor]
"""From latents in the scheduler's scale (N, ...) to images (N, 3, H, W) in [0, 1] or waveforms (N, C, L) in [-1, 1]."""


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Decode latents (N, ...) to images (N, 3, H, W) in [0, 1] or waveforms (N, C, L) in [-1, 1], float32.

    ``size`` (height, width) in pixels is needed for latents that are packed into tokens. Raises ValueError for a
    pipeline without an autoencoder, or packed latents without a size.
    """
    if getattr(pipe, "vae", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no component named vae: give steer your own decode=")
    vae, config = pipe.vae, pipe.vae.config
    if isinstance(pipe, StableAudioPipeline):
        waveforms: Tensor = vae.decode(latents.to(vae.dtype)).sample.float()
        return waveforms
    if isinstance(pipe, AceStepPipeline):
        return normalize_peak(vae.decode(latents.transpose(1, 2).to(vae.dtype)).sample.float())
    if isinstance(pipe, FluxPipeline):
        if size is None:
            raise ValueError("FLUX packs its latents into tokens: the size of the image is needed to unpack them")
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)

    # Undo the scaling of the latents, by statistics of each channel or by one factor and shift
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.tensor(values).view(shape).to(latents) for values in (mean, std))
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    return (_upcast_decode(vae, latents).float() / 2 + 0.5).clamp(0, 1)


def _upcast_decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode unscaled latents, in float32 with an autoencoder that overflows in half precision."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        decoded: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(dtype)
    return decoded
