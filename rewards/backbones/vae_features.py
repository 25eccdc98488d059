"""Features of images and sound from the autoencoder of a diffusion model, which needs no other network.

DRAGON (arXiv 2504.15217) compares generated with reference audio by the latents of the model that it trains.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign import assets
from genalign.runtime.waveforms import require_waveforms, resample, warn_once
from genalign.types import Precision
from rewards.backbones.encoders import Features, PatchFeatures

_TINY = 1e-6  # for the gradient of a deviation of 0


@dataclass(frozen=True)
class VaeFeatures(PatchFeatures):
    """Latents of a model's own VAE, as the mean and standard deviation over a sample's parts, and of each part.

    A part is a latent frame of a clip or a latent pixel of an image; with ``patch`` it is as many consecutive frames,
    or a square of that side, whose latents follow each other in one vector, so covariances tell neighbors apart.

    Attributes:
        model: The diffusers folder, Hub id or embedded name (shapes-sd3) of a model with an ``AutoencoderKL`` of images
            or an ``AutoencoderOobleck`` of waveforms, which is opened at the first call, frozen.
        sample_rate: The sample rate of the samples in Hz; None for images.
        patch: The number of frames, or the side of the square, of a part.
        dtype: The precision of the weights.
    """

    model: str
    sample_rate: int | None = None
    patch: int = 1
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise ValueError(f"patch must be at least 1 latent pixel or frame, not {self.patch}")

    def features(self, samples: Tensor) -> Features:
        """Compute features of images (B, 3, H, W) in [0, 1] or waveforms (B, C, L) in [-1, 1]; differentiable.

        With c latent channels and n parts of d = c ``patch`` (squared for images), they are global (B, 2 d) and
        patches (B, n, d). Raises ValueError for samples of another kind than the VAE's, or with fewer than 2 parts.
        """
        vae = _load_vae(assets.resolve(self.model), self.dtype).to(samples.device)
        latents = vae.encode(self._prepare(vae, samples).to(vae.dtype)).latent_dist.mode().float()
        if latents.ndim == 4:  # (B, c, h, w) of images, without a remainder at the end
            parts = F.unfold(latents, self.patch, stride=self.patch).transpose(1, 2)
        else:  # (B, c, f) of waveforms
            enough = self.patch <= latents.shape[2]
            frames = latents.unfold(2, self.patch, self.patch) if enough else latents[:, :, :0, None]
            parts = frames.transpose(1, 2).flatten(2)
        if parts.shape[1] < 2:
            raise ValueError(
                f"a sample has {parts.shape[1]} parts of patch {self.patch} in the latents of {self.model}, and"
                " features need 2: lower patch, or give larger samples"
            )
        deviation = (parts.var(1, correction=0) + _TINY).sqrt()
        return Features(torch.cat([parts.mean(1), deviation], 1), parts)

    def _prepare(self, vae: Any, samples: Tensor) -> Tensor:
        """Bring images into [-1, 1], and waveforms to the VAE's sample rate and number of channels."""
        if samples.ndim == 4:
            if "in_channels" not in vae.config or samples.shape[1] != vae.config.in_channels:
                raise ValueError(
                    f"the VAE of {self.model} takes no images of {samples.shape[1]} channels: name another model"
                )
            return 2 * samples.float() - 1
        if "audio_channels" not in vae.config or self.sample_rate is None:
            reason = "set sample_rate" if self.sample_rate is None else "name a model of audio"
            raise ValueError(f"the VAE of {self.model} cannot read waveforms as it is: {reason}")
        rate, channels = int(vae.config.sampling_rate), int(vae.config.audio_channels)
        heard = require_waveforms(samples)
        if rate != self.sample_rate:
            warn_once(f"the VAE of {self.model} hears {rate} Hz: waveforms at {self.sample_rate} Hz are resampled")
            heard = resample(heard, self.sample_rate, rate)
        if heard.shape[1] != channels:
            heard = heard.mean(1, keepdim=True).expand(-1, channels, -1)
        return heard


@functools.cache
def _load_vae(model: str, dtype: Precision) -> Any:
    """Open the VAE of a model, frozen. Raises ValueError for a model without one that reads images or waveforms."""
    from diffusers import AutoencoderKL, AutoencoderOobleck, AutoModel

    if Path(model).is_dir() and not (Path(model) / "vae" / "config.json").is_file():
        raise ValueError(
            f"{model} has no vae/config.json: give a diffusers folder of a model of latents, or its Hub id"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)  # in diffusers' Oobleck
        vae = AutoModel.from_pretrained(model, subfolder="vae", torch_dtype=getattr(torch, dtype), use_safetensors=True)
    if not isinstance(vae, AutoencoderKL | AutoencoderOobleck):
        raise ValueError(
            f"the VAE of {model} is of class {type(vae).__name__}: features need an AutoencoderKL or -Oobleck"
        )
    return vae.requires_grad_(False).eval()
