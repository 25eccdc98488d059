"""Waveforms (B, C, L) in [-1, 1]: differentiable mixing, resampling and mel spectra, and pictures of spectra."""

from __future__ import annotations

import functools
import logging
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

logger = logging.getLogger(__name__)

_ZEROS = 64  # zero crossings of the sinc on either side
_ROLLOFF = 0.9475937167399596  # of the lower Nyquist frequency
_BETA = 14.769656459379492  # of the Kaiser window
_LEAST_POWER = 1e-10  # -100 dB
_COLUMNS, _BANDS = 220, 96  # pixels of a spectrogram
_WINDOW_SECONDS, _LOWEST_HZ = 0.064, 50.0
_QUIET, _LOUD = -80.0, 0.0  # dB of a full-scale sine, at the ends of the colors: the same for all clips
_COLORS = ((8, 12, 34), (56, 34, 110), (170, 52, 108), (244, 137, 72), (252, 240, 190))


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


def spectrogram(waveform: Tensor, rate: int) -> Image.Image:
    """Draw the spectrogram of one channel (1, L) at ``rate`` Hz.

    Time runs to the right and log frequency upwards to half the rate; brightness is in dB of full scale, on the same
    scale for all clips.
    """
    window = max(8, round(_WINDOW_SECONDS * rate))
    padded = F.pad(waveform, (0, max(0, window - waveform.shape[1])))
    spectra = mel_decibels(padded, _log_bands(window, rate), window, max(1, -(-padded.shape[1] // _COLUMNS)))[0]
    full_scale = 20 * np.log10(window / 4)  # of a sine through a Hann window
    share = ((spectra.T.flip(0) - full_scale - _QUIET) / (_LOUD - _QUIET)).clamp(0, 1)
    image = Image.fromarray(share.mul(255).round().byte().numpy(), "L")
    at, stops = np.linspace(0, len(_COLORS) - 1, 256), np.arange(len(_COLORS))
    channels = [np.interp(at, stops, channel) for channel in zip(*_COLORS, strict=True)]
    image.putpalette(np.stack(channels, 1).round().astype(np.uint8).tobytes())
    return image


@functools.cache
def _log_bands(window: int, rate: int) -> Tensor:
    """Return triangular filters (window // 2 + 1, bands) of height 1 at even steps of log frequency.

    Each is at least two bins wide.
    """
    nyquist, lowest = rate / 2, lowest_frequency(rate)
    centers = lowest * (nyquist / lowest) ** ((torch.arange(_BANDS) + 0.5) / _BANDS)
    reach = (centers * ((nyquist / lowest) ** (1 / _BANDS) - 1)).clamp(min=rate / window)
    bins = torch.linspace(0, nyquist, window // 2 + 1)[:, None]
    bands: Tensor = (1 - (bins - centers).abs() / reach).clamp(min=0)
    return bands


def lowest_frequency(rate: int) -> float:
    """Return the frequency in Hz at the lower edge of a spectrogram."""
    return min(_LOWEST_HZ, rate / 16)
