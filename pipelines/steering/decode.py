"""From a diffusers pipeline's latents to samples, family by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AceStepPipeline, DiffusionPipeline, FluxPipeline, StableAudioPipeline
from torch import Tensor

from pipelines.ace_step import at_one_loudness

Decode = Callable[[Tensor], Tensor]
"""From latents as the scheduler has them at the end (N, ...) to images (N, 3, H, W) in [0, 1] or waveforms."""


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] or waveforms (N, C, L) in [-1, 1], float32.

    ``size`` (height, width) in pixels is needed where latents are packed into tokens. Raises ValueError for a pipeline
    without a decoder that is known here.
    """
    if not hasattr(pipe, "vae") or pipe.vae is None:
        raise ValueError(f"{type(pipe).__name__} has no autoencoder that is known here: give steer your own decode=")
    if isinstance(pipe, FluxPipeline):
        if size is None:
            raise ValueError("FLUX packs its latents into tokens: the size of the image is needed to unpack them")
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    if isinstance(pipe, StableAudioPipeline):
        waveforms: Tensor = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample.float()
        return waveforms
    if isinstance(pipe, AceStepPipeline):
        return at_one_loudness(pipe.vae.decode(latents.transpose(1, 2).to(pipe.vae.dtype)).sample.float())
    return (_decoded(pipe.vae, _unscaled(pipe.vae, latents)).float() / 2 + 0.5).clamp(0, 1)


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    """By the autoencoder's statistics, or its factor and shift."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.tensor(values).view(shape).to(latents) for values in (mean, std))
        unscaled: Tensor = latents * std / config.scaling_factor + mean
        return unscaled
    shifted: Tensor = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    return shifted


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """In float32 for an autoencoder that overflows in half precision, which is then put back."""
    before = vae.dtype
    upcast = before == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        decoded: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(before)
    return decoded
