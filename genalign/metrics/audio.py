"""What clips sound like, whatever they play: statistics that a reward which is being exploited drags along, and guards.

All of them are of waveforms (B, C, L) in [-1, 1], over all channels, at any sample rate. Levels are RMS in dB of full
scale (a full-scale sine is at -3.0), not loudness in LUFS: nothing is weighted by how an ear hears it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-6
_LEAST = 1e-5  # amplitude: -100 dB
CLIPPED = 0.999  # amplitude from which a sample counts as clipped
SILENT = 1e-3  # RMS of a frame that counts as silent: -60 dB
FRAME = 256  # samples


def level(waveforms: Tensor) -> Tensor:
    """RMS in dB of full scale, (B,); -100 for silence."""
    return _decibels(waveforms.float().square().mean((1, 2)).add(_LEAST**2).sqrt())


def crest(waveforms: Tensor) -> Tensor:
    """The peak over the RMS in dB, (B,): what distortion and compression lower; 0 for silence."""
    peak = waveforms.float().abs().amax((1, 2))
    return _decibels(peak.square().add(_LEAST**2).sqrt()) - level(waveforms)


def high_frequency(waveforms: Tensor) -> Tensor:
    """The logarithm (B,) of the share that frequencies above half of the Nyquist frequency have of the power: what
    noise and distortion raise, and muffling lowers."""
    centred = waveforms.float() - waveforms.float().mean(2, keepdim=True)
    power = torch.fft.rfft(centred).abs().square().sum(1)
    high = torch.fft.rfftfreq(waveforms.shape[2], device=waveforms.device) > 0.25
    share: Tensor = (power[:, high].sum(1) + _TINY) / (power.sum(1) + _TINY)
    return share.log()


def clipped(waveforms: Tensor) -> Tensor:
    """The share (B,) of samples at full scale."""
    return (waveforms.abs() >= CLIPPED).float().mean((1, 2)) + _nan_where_failed(waveforms)


def silent(waveforms: Tensor) -> Tensor:
    """The share (B,) of frames of 256 samples below -60 dB of full scale; the last may be shorter."""
    frames = torch.split(waveforms.float(), FRAME, dim=2)
    quiet = torch.stack([frame.square().mean((1, 2)).sqrt() < SILENT for frame in frames])
    return quiet.float().mean(0) + _nan_where_failed(waveforms)


def _decibels(amplitude: Tensor) -> Tensor:
    return 20 * amplitude.log10()


def _nan_where_failed(waveforms: Tensor) -> Tensor:
    """0, or NaN (B,) for a clip that is not finite: a comparison would let it pass."""
    finite = waveforms.isfinite().flatten(1).all(1)
    return torch.zeros(len(waveforms), device=waveforms.device).masked_fill(~finite, torch.nan)
