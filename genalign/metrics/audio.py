"""Statistics of clips of any content, which shift when a model exploits a reward.

All of them are of waveforms (B, C, L) in [-1, 1], over all channels, at any sample rate. Levels are RMS in dB of full
scale (a full-scale sine is at -3.0), not loudness in LUFS: there is no perceptual weighting.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-6
_FLOOR = 1e-5  # amplitude: -100 dB
CLIPPED = 0.999  # amplitude from which a sample counts as clipped
SILENT = 1e-3  # RMS of a frame that counts as silent: -60 dB
FRAME = 256  # samples


def level(waveforms: Tensor) -> Tensor:
    """Compute the RMS in dB of full scale, (B,); -100 for silence."""
    return _decibels(waveforms.float().square().mean((1, 2)).add(_FLOOR**2).sqrt())


def crest(waveforms: Tensor) -> Tensor:
    """Compute the peak over the RMS in dB, (B,), which distortion and compression lower; 0 for silence."""
    peak = waveforms.float().abs().amax((1, 2))
    return _decibels(peak.square().add(_FLOOR**2).sqrt()) - level(waveforms)


def high_frequency(waveforms: Tensor) -> Tensor:
    """Compute the log (B,) of the fraction of the power above half of the Nyquist frequency.

    Noise and distortion raise it, muffling lowers it.
    """
    centered = waveforms.float() - waveforms.float().mean(2, keepdim=True)
    power = torch.fft.rfft(centered).abs().square().sum(1)
    high = torch.fft.rfftfreq(waveforms.shape[2], device=waveforms.device) > 0.25
    share: Tensor = (power[:, high].sum(1) + _TINY) / (power.sum(1) + _TINY)
    return share.log()


def spectral_centroid(waveforms: Tensor) -> Tensor:
    """Compute the mean frequency (B,) of the power spectrum, as a fraction of the Nyquist frequency; 0 for silence.

    A sound is brighter the higher it is.
    """
    centered = waveforms.float() - waveforms.float().mean(2, keepdim=True)
    power = torch.fft.rfft(centered).abs().square().sum(1)
    frequency = 2 * torch.fft.rfftfreq(waveforms.shape[2], device=waveforms.device)
    centroid: Tensor = (power * frequency).sum(1) / (power.sum(1) + _TINY)
    return centroid


def clipped(waveforms: Tensor) -> Tensor:
    """Compute the fraction (B,) of values at full scale."""
    return (waveforms.abs() >= CLIPPED).float().mean((1, 2)) + _nan_where_failed(waveforms)


def silent(waveforms: Tensor) -> Tensor:
    """Compute the fraction (B,) of frames of 256 values below -60 dB of full scale; the last may be shorter."""
    frames = torch.split(waveforms.float(), FRAME, dim=2)
    quiet = torch.stack([frame.square().mean((1, 2)).sqrt() < SILENT for frame in frames])
    return quiet.float().mean(0) + _nan_where_failed(waveforms)


def _decibels(amplitude: Tensor) -> Tensor:
    return 20 * amplitude.log10()


def _nan_where_failed(waveforms: Tensor) -> Tensor:
    """Return (B,) of 0, or NaN for a clip that is not finite: a comparison would let it pass."""
    finite = waveforms.isfinite().flatten(1).all(1)
    return torch.zeros(len(waveforms), device=waveforms.device).masked_fill(~finite, torch.nan)
