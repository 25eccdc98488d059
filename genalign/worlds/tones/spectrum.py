"""Naming of a segment of sound: its fundamental by harmonic summation, its timbre by the energies of harmonics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.ndimage import uniform_filter1d

from genalign.worlds.tones.instruments import NOISE, NOTES, PITCHED, SAMPLE_RATE, Array, audible

UNKNOWN = "unknown"
BINS = 2**14  # points of the zero-padded transform, 0.49 Hz apart
FLOOR_DB = -28.0  # harmonics below this are as good as silent
BAND_HZ = 12.0  # in which a harmonic of a candidate is looked for
COMPARED = 6  # harmonics that are compared with a template
MIN_COSINE = 0.85
MAX_DISTANCE = 11.0  # dB
MIN_HARMONIC_SHARE = 0.6  # of the energy, for a tone of one pitch
NOISE_HARMONIC_SHARE = 0.75  # noise has less
NOISE_FLATNESS = 0.15  # and more of this
NEAREST_CENTS = 50.0
_HZ = SAMPLE_RATE / BINS
_AUDIBLE = slice(round(100 / _HZ), round(3900 / _HZ))
_GRID = 230 * 2 ** (np.arange(505) / 240)  # candidate fundamentals, 5 cents apart, to 985 Hz
_HARMONICS = np.arange(1, COMPARED + 1)
_WEIGHTS = 0.8 ** (_HARMONICS - 1)


@dataclass(frozen=True)
class Sound:
    """What a segment sounds like.

    Attributes:
        timbre: The best template, or "unknown" if none fits.
        note: The nearest note; None for noise, or if no note is within 50 cents.
        frequency: The frequency of the fundamental in Hz.
        distance: The distance to the timbre's template in dB.
        harmonic_share: The fraction of the energy in harmonics of the fundamental.
        flatness: The flatness of the spectrum, in [0, 1].
    """

    timbre: str
    note: str | None
    frequency: float
    distance: float
    harmonic_share: float
    flatness: float


def describe(segment: Array) -> Sound:
    """Name the sound of ``segment`` (L,), which is one event without its ramps."""
    power = np.abs(np.fft.rfft(segment * np.hanning(len(segment)), BINS)) ** 2
    frequency = fundamental(power)
    floor = float(np.median(power[_AUDIBLE])) / np.log(2)  # the mean of noise whose powers are exponential
    energies = harmonic_energies(power, frequency, floor)
    share = float(energies.sum() / max(power[_AUDIBLE].sum(), 1e-20))
    heard = power[_AUDIBLE] + 1e-20
    flatness = float(np.exp(np.log(heard).mean()) / heard.mean())
    if flatness > NOISE_FLATNESS and share < NOISE_HARMONIC_SHARE:
        return Sound(NOISE, None, frequency, 0.0, share, flatness)
    timbre, distance = _timbre(np.sqrt(energies[:COMPARED]), frequency)
    if share < MIN_HARMONIC_SHARE:
        timbre = UNKNOWN
    return Sound(timbre, nearest_note(frequency), frequency, distance, share, flatness)


def fundamental(power: Array) -> float:
    """Estimate the fundamental in Hz of a tone from its power spectrum (BINS / 2 + 1,).

    The candidate f with the largest sum over k <= 6 of 0.8^(k-1) (A(k f) - A((k - 1/2) f)), A the amplitude in a band
    of 12 Hz: what lies between the harmonics speaks for an octave below. Refined by a parabola through the strongest
    of the first three harmonics.
    """
    at, between = _lookup()
    smooth = np.maximum(uniform_filter1d(power, round(BAND_HZ / _HZ)), 0.0)  # its running sum may end below zero
    band = np.append(np.sqrt(smooth), 0.0)
    coarse = float(_GRID[((band[at] - band[between]) @ _WEIGHTS).argmax()])
    bins = []
    for k in (1, 2, 3):  # the largest power within 1 % of each harmonic
        low, high = (int(k * coarse * share / _HZ) for share in (0.99, 1.01))
        bins.append(min(low + int(power[low : high + 2].argmax()), len(power) - 2))
    strongest = int(np.argmax(power[bins]))
    i = bins[strongest]
    left, top, right = np.log(power[i - 1 : i + 2] + 1e-20)
    curve = left - 2 * top + right
    offset = 0.5 * (left - right) / curve if curve < 0 else 0.0
    return float((i + np.clip(offset, -1, 1)) * _HZ / (strongest + 1))


@cache
def _lookup() -> tuple[Array, Array]:
    """Bins of the harmonics and of the points between them, (candidates, 6); those beyond the band are the last one."""
    on, between = _GRID[:, None] * _HARMONICS, _GRID[:, None] * (_HARMONICS - 0.5)
    return _bins(on), _bins(between)


def _bins(frequencies: Array) -> Array:
    last = BINS // 2 + 1
    return np.where(frequencies < SAMPLE_RATE / 2, np.rint(frequencies / _HZ), last).astype(int)


def harmonic_energies(power: Array, frequency: float, floor: float) -> Array:
    """Energy of each harmonic of ``frequency`` Hz in the band, within 3 % or 25 Hz of it, less the noise ``floor``.

    Bands, not peaks: vibrato and phase errors spread a harmonic without weakening it.
    """
    total = np.concatenate([[0.0], np.cumsum(power)])
    centers = frequency * np.arange(1, int(3900 / frequency) + 1)
    half = np.maximum(0.03 * centers, 25.0)
    low = np.maximum(((centers - half) / _HZ).astype(int), 0)
    high = np.minimum(((centers + half) / _HZ).astype(int) + 1, len(power))
    energies: Array = np.maximum(total[high] - total[low] - floor * (high - low), 0.0)
    return energies


def _timbre(amplitudes: Array, frequency: float) -> tuple[str, float]:
    """The pitched timbre whose first harmonics are nearest in dB, and that distance; "unknown" beyond the limits."""
    if not amplitudes.any():
        return UNKNOWN, np.inf
    heard = _above_floor(amplitudes)
    harmonics = [audible(PITCHED[name], frequency) for name in PITCHED]
    templates = [np.array([series.get(k + 1, 0.0) for k in range(len(amplitudes))]) for series in harmonics]
    distances = [float(np.sqrt(np.mean((heard - _above_floor(t)) ** 2))) for t in templates]
    best = int(np.argmin(distances))
    cosine = amplitudes @ templates[best] / np.linalg.norm(amplitudes) / np.linalg.norm(templates[best])
    fits = cosine >= MIN_COSINE and distances[best] <= MAX_DISTANCE
    return (list(PITCHED)[best] if fits else UNKNOWN), distances[best]


def _above_floor(amplitudes: Array) -> Array:
    decibels: Array = np.maximum(20 * np.log10(amplitudes / amplitudes.max() + 1e-12), FLOOR_DB)
    return decibels


def nearest_note(frequency: float) -> str | None:
    """The note within 50 cents of ``frequency`` Hz, or None."""
    cents = {note: abs(1200 * np.log2(frequency / hz)) for note, hz in NOTES.items()}
    best = min(cents, key=cents.__getitem__)
    return best if cents[best] <= NEAREST_CENTS else None
