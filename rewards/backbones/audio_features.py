"""Features of whole clips and of their frames, for Frechet distances, kernel distances and diversity.

Each is a feature function (B, C, L) -> (B, d) with a method ``features`` that also gives the frames
(``rewards.backbones.encoders.PatchFeatures``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.runtime.waveforms import as_heard, mel_decibels
from genalign.types import AnyCallable, Precision
from rewards.backbones.clap_encoder import load_clap
from rewards.backbones.encoders import Features, PatchFeatures, require_patches
from rewards.backbones.reference_images import ReferenceSamples

_LOWEST_HZ = 50.0
_TINY = 1e-4  # dB^2, for the gradient of a deviation of 0


@dataclass(frozen=True)
class ClapFeatures(PatchFeatures):
    """CLAP's unit embedding of a clip, and of its frames.

    ``model``, ``sample_rate`` and ``dtype`` are as for ``rewards.clap.ClapReward``. The model is opened at the first
    call, frozen.
    """

    model: str
    sample_rate: int
    dtype: Precision = "float32"

    def features(self, samples: Tensor) -> Features:
        """Compute embeddings (B, d) of waveforms (B, C, L) and (B, n, d) of their frames; differentiable."""
        return load_clap(self.model, self.dtype).to(samples.device).features(samples, self.sample_rate)


@dataclass(frozen=True)
class LogMelFeatures(PatchFeatures):
    """Mel spectra in dB: the mean and the standard deviation of every band over the frames of a clip.

    There are ``mels`` bands from 50 Hz to half of ``sample_rate``, in Hann windows of ``window`` seconds every ``hop``.
    They tell timbre, pitch and level apart, but no meaning. With a ``floor`` in dB levels are counted from there, and
    lower ones as 0: silence is the origin, so metrics by direction, such as
    ``rewards.set_rewards.VendiReward``, compare spectra.
    """

    sample_rate: int
    mels: int = 64
    window: float = 0.064
    hop: float = 0.016
    floor: float | None = None

    def features(self, samples: Tensor) -> Features:
        """Compute features in dB of waveforms (B, C, L), as (B, 2 mels), and of their frames (B, n, mels).

        Raises ValueError for clips shorter than a window.
        """
        clips = as_heard(samples, self.sample_rate, self.sample_rate, "the log-mel encoder")
        window, hop = (round(seconds * self.sample_rate) for seconds in (self.window, self.hop))
        frames = mel_decibels(clips, _mel_filters(self.sample_rate, window, self.mels), window, hop)
        if self.floor is not None:
            frames = (frames - self.floor).clamp(min=0)
        deviation = (frames.var(1, correction=0) + _TINY).sqrt()
        return Features(torch.cat([frames.mean(1), deviation], 1), frames)


@functools.cache
def _mel_filters(rate: int, window: int, mels: int) -> Tensor:
    """Build Slaney's mel filters of equal area, (window // 2 + 1, mels)."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(window // 2 + 1, mels, _LOWEST_HZ, rate / 2, rate, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()


@dataclass(frozen=True)
class FrameFeatures:
    """All frames of a clip in one row (B, n d), for FAD by frames with ``rewards.set_rewards.FrameFrechetReward``.

    ``encoder`` is any ``rewards.backbones.encoders.PatchFeatures``.
    """

    encoder: AnyCallable

    def __call__(self, samples: Tensor) -> Tensor:
        """Compute rows (B, n d) of waveforms (B, C, L); differentiable."""
        return require_patches(self.encoder).features(samples).patches.flatten(1)


@torch.no_grad()
def extract_frame_features(clips: ReferenceSamples, encoder: AnyCallable) -> Tensor:
    """Extract features (m, d) of all frames of ``clips``, which may differ in length: the reference set of a FAD.

    Raises ValueError for fewer than 2 frames, which have no covariance.
    """
    frame_encoder = require_patches(encoder)
    frames = torch.cat([frame_encoder.features(clips.load([row])).patches[0] for row in range(len(clips))])
    if len(frames) < 2:
        raise ValueError("the references have 1 frame in all, which has no covariance: give longer clips, or more")
    return frames


def extract_text_features(texts: list[str], model: str) -> Tensor:
    """Compute CLAP's unit text embeddings (m, d): a reference set in words, for ``ClapFeatures(model, ...)``.

    Texts and sounds lie apart in CLAP's space, so a distance between them falls without reaching 0. Raises
    ValueError for fewer than 2 texts, which have no covariance.
    """
    if len(texts) < 2:
        raise ValueError(f"a reference set in words needs 2 texts or more, got {len(texts)}")
    return load_clap(model).text(texts)
