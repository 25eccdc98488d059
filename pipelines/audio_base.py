"""The base of the audio families: duration in place of a size, and waveforms."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.base import DiffusersPipeline
from pipelines.family import most_likely
from pipelines.options import Options


class AudioPipeline(DiffusersPipeline):
    """A family of audio: latents (B, C, frames), and waveforms (B, channels, L) in [-1, 1] of ``seconds``."""

    default_negative = None
    default_seconds: ClassVar[float | None] = None  # by default all that the network can generate

    @property
    def max_seconds(self) -> float:
        """The longest duration in seconds that the network can generate."""
        return math.inf

    @property
    def own_seconds(self) -> float:
        """The duration in seconds of the checkpoint's clips."""
        return self.max_seconds if self.default_seconds is None else self.default_seconds

    @property
    @abstractmethod
    def frames(self) -> int:
        """The number of latent frames of a sample."""

    @classmethod
    def load(cls, path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, **options: Unpack[Options]) -> Self:
        """Open a diffusers folder or a Hub id, without torch's warning of the weight_norm in diffusers' Oobleck."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
            return super().load(path_or_id, dtype=dtype, **options)

    def _set_size(self, options: Options) -> None:
        """Set ``seconds``, the duration of the samples."""
        if options.get("height") is not None or options.get("width") is not None:
            raise ValueError("this model makes audio: leave height and width out, and give seconds")
        seconds = options.get("seconds")
        self.seconds = self.own_seconds if seconds is None else seconds
        if not 0 < self.seconds <= self.max_seconds:
            raise ValueError(
                f"seconds must be above 0 and at most {self.max_seconds:g} for this model, not {self.seconds}"
            )

    def encoding_settings(self) -> dict[str, Any]:
        """Return what embeddings depend on beside the text and the weights: the duration, too."""
        return super().encoding_settings() | {"seconds": self.seconds}

    @property
    def sample_rate(self) -> int:
        """The sample rate of the waveforms in Hz."""
        return int(self.pipe.vae.config.sampling_rate)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape (C, frames) of one sample's latents."""
        return self.latent_channels, self.frames

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape (channels, L) of one waveform."""
        return int(self.pipe.vae.config.audio_channels), self.frames * int(self.pipe.vae.hop_length)

    def run_vae(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, frames) with the VAE to waveforms (B, channels, L), not yet in [-1, 1]."""
        waveforms: Tensor = self.pipe.vae.decode(latents.to(self.pipe.vae.dtype), return_dict=False)[0]
        return waveforms

    def run_encoder(self, samples: Tensor) -> Tensor:
        """Encode waveforms (B, channels, L) in [-1, 1], padded with silence, to latents (B, C, frames)."""
        silence = self.frames * int(self.pipe.vae.hop_length) - samples.shape[-1]
        return most_likely(self.pipe.vae.encode(F.pad(samples, (0, silence)).to(self.pipe.vae.dtype)))
