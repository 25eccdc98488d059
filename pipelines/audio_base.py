"""What the wrappers of audio families share: duration, waveforms, and encoders beside the text's."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Self, Unpack

import torch
from torch import Tensor

from pipelines.base import DiffusersPipeline, Options


class AudioPipeline(DiffusersPipeline):
    """A family whose latents are (B, C, frames), and whose samples are waveforms (B, channels, L) in [-1, 1] at
    ``sample_rate``. They last ``seconds``.
    """

    unconditional = None

    @classmethod
    def load(cls, path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, **options: Unpack[Options]) -> Self:
        """As every family, without torch's warning that diffusers' Oobleck normalises weights in the older way."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
            return super().load(path_or_id, dtype=dtype, **options)

    def _take_size(self, options: Options) -> None:
        if options.get("height") is not None or options.get("width") is not None:
            raise ValueError("this model makes audio: leave height and width out, and give seconds")
        asked = options.get("seconds")
        self.seconds = self._native_seconds() if asked is None else asked
        if not 0 < self.seconds <= self._longest_seconds():
            raise ValueError(
                f"seconds must be above 0 and at most {self._longest_seconds():g} for this model, not {self.seconds}"
            )

    @abstractmethod
    def _native_seconds(self) -> float:
        """How long samples last unless the user chooses."""

    def _longest_seconds(self) -> float:
        """The longest that the model can make."""
        return math.inf

    @property
    @abstractmethod
    def frames(self) -> int:
        """Of the latents of a sample."""

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return int(self.pipe.vae.config.sampling_rate)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, frames) of one sample."""
        return self.latent_channels, self.frames

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(channels, L) of one waveform."""
        return int(self.pipe.vae.config.audio_channels), self.frames * self._hop

    @property
    def _hop(self) -> int:
        """Samples of a waveform for each frame of its latents."""
        return int(self.pipe.vae.hop_length)

    def run_vae(self, latents: Tensor) -> Tensor:
        """Waveforms (B, channels, L) as the autoencoder makes them, of no certain range."""
        waveforms: Tensor = self.pipe.vae.decode(latents.to(self._vae_dtype), return_dict=False)[0]
        return waveforms
