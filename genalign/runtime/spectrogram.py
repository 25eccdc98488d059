"""Spectrograms of waveforms as pictures."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genalign.runtime.waveforms import mel_decibels

_COLUMNS, _BANDS = 220, 96  # pixels of a spectrogram
_WINDOW_SECONDS, _LOWEST_HZ = 0.064, 50.0
_QUIET, _LOUD = -80.0, 0.0  # dB of a full-scale sine, at the ends of the colors: the same for all clips
_COLORS = ((8, 12, 34), (56, 34, 110), (170, 52, 108), (244, 137, 72), (252, 240, 190))


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
    image.putpalette(_palette())
    return image


@cache
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


@cache
def _palette() -> list[int]:
    """RGB bytes of a palette of 256 colors, from dark to light."""
    at, stops = np.linspace(0, len(_COLORS) - 1, 256), np.arange(len(_COLORS))
    channels = [np.interp(at, stops, channel) for channel in zip(*_COLORS, strict=True)]
    return [int(value) for value in np.stack(channels, 1).round().ravel()]
