"""Waveforms (B, C, L) in [-1, 1]: mixing, resampling and mel spectra, all differentiable."""

from __future__ import annotations

import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

_ZEROS = 64  # zero crossings of the sinc on either side
_ROLLOFF = 0.9475937167399596  # of the lower Nyquist frequency
_BETA = 14.769656459379492  # of the Kaiser window
_LEAST_POWER = 1e-10  # -100 dB


def require_waveforms(waveforms: Tensor) -> Tensor:
    """Return ``waveforms`` in float32. Raises ValueError for another shape than (B, C, L), TypeError for integers."""
    if waveforms.ndim != 3 or not waveforms.shape[1] or not waveforms.shape[2]:
        raise ValueError(f"waveforms must be (B, C, L) in [-1, 1], not a tensor of shape {tuple(waveforms.shape)}")
    if not waveforms.is_floating_point():
        raise TypeError(f"waveforms must be floating point in [-1, 1], not {waveforms.dtype}")
    return waveforms.float()


def as_heard(waveforms: Tensor, rate: int, target_rate: int, listener: str) -> Tensor:
    """Mix waveforms (B, C, L) at ``rate`` Hz to one channel (B, L') at ``target_rate`` Hz.

    Logs one warning for each ``listener`` and rate if that mixes channels or resamples.
    """
    waveforms = require_waveforms(waveforms)
    if waveforms.shape[1] > 1:
        warn_once(f"{listener} hears one channel: the mean of {waveforms.shape[1]} is taken")
    if rate != target_rate:
        lost = f"nothing above {min(rate, target_rate) / 2:g} Hz is heard"
        warn_once(f"{listener} hears {target_rate} Hz: waveforms at {rate} Hz are resampled, and {lost}")
    return resample(waveforms.mean(1), rate, target_rate)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it is passed."""
    logger.warning(message)


def resample(waveforms: Tensor, rate: int, target_rate: int) -> Tensor:
    """Resample waveforms (..., L) from ``rate`` Hz to (..., ceil(L target_rate / rate)), zero beyond their ends.

    Band-limited interpolation by a sinc with a Kaiser window (J. O. Smith, Digital Audio Resampling), with the settings
    that FAD tools use: 64 zero crossings, rolloff 0.9476, beta 14.77. Raises ValueError for a rate below 1.
    """
    if rate < 1 or target_rate < 1:
        raise ValueError(f"a sample rate must be a positive number of Hz, not {rate} and {target_rate}")
    if rate == target_rate:
        return waveforms
    common = math.gcd(rate, target_rate)
    down, up = rate // common, target_rate // common
    kernel = _interpolation(down, up).to(waveforms)
    reach = (kernel.shape[-1] - down) // 2
    length = waveforms.shape[-1]
    padded = F.pad(waveforms.reshape(-1, 1, length), (reach, reach + down))
    blocks = F.conv1d(padded, kernel, stride=down)  # (n, up, blocks): each of down samples makes up of them
    resampled = blocks.transpose(1, 2).flatten(1)[:, : -(-length * up // down)]
    return resampled.reshape(*waveforms.shape[:-1], -1)


@functools.cache
def _interpolation(down: int, up: int) -> Tensor:
    """Return kernels (up, 1, down + 2 reach): row p computes the sample at p down / up of each ``down`` samples."""
    cutoff = _ROLLOFF * min(1.0, up / down)
    reach = math.ceil(_ZEROS / cutoff)
    taps = torch.arange(-reach, down + reach, dtype=torch.float64)
    distance = cutoff * (taps - (torch.arange(up, dtype=torch.float64) * down / up)[:, None])
    inside = (1 - (distance / _ZEROS).square()).clamp(min=0)
    window = torch.special.i0(_BETA * inside.sqrt()) / torch.special.i0(torch.tensor(_BETA, dtype=torch.float64))
    kernel: Tensor = cutoff * torch.sinc(distance) * window * (inside > 0)
    return kernel[:, None]


def mel_decibels(waveforms: Tensor, filters: Tensor, window: int, hop: int) -> Tensor:
    """Compute mel spectra in dB, (B, frames, mels), of waveforms (B, L), of at least -100 dB.

    Args:
        waveforms: One channel each, (B, L).
        filters: Mel filters (window // 2 + 1, mels).
        window: The length of the Hann window in samples; the first is centered on the first sample.
        hop: The distance of two windows in samples.

    Raises:
        ValueError: the clips are shorter than a window.
    """
    if waveforms.shape[-1] < window:
        raise ValueError(
            f"a clip of {waveforms.shape[-1]} samples is shorter than a window of {window}: give longer clips"
        )
    shape = torch.hann_window(window, device=waveforms.device)
    spectra = torch.stft(waveforms, window, hop, window=shape, pad_mode="reflect", return_complex=True)
    power = spectra.abs().square().transpose(1, 2)
    return 10 * (power @ filters.to(waveforms.device)).clamp(min=_LEAST_POWER).log10()
