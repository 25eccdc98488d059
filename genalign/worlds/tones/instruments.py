"""Timbres, notes and durations of the tones world.

A pitched timbre is a table of harmonic amplitudes: {harmonic: amplitude}, all in phase as sines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Harmonics = Mapping[int, float]

SAMPLE_RATE = 8000  # Hz
LENGTH = 12000  # samples of a clip: 1.5 s
BAND_LIMIT = 0.46 * SAMPLE_RATE  # Hz; no harmonic is drawn above it
MAX_HARMONIC = 14  # of the lowest note below the band limit

NOTES: dict[str, float] = {
    "C4": 261.626,
    "D4": 293.665,
    "E4": 329.628,
    "G4": 391.995,
    "A4": 440.0,
    "C5": 523.251,
    "D5": 587.330,
    "E5": 659.255,
    "G5": 783.991,
    "A5": 880.0,
}
"""Fundamental frequencies in Hz, equal temperament; lower notes first."""


def _series(amplitude: Callable[[int], float], step: int = 1) -> dict[int, float]:
    return {k: amplitude(k) for k in range(1, MAX_HARMONIC + 1, step)}


PITCHED: dict[str, Harmonics] = {
    "sine": {1: 1.0},
    "square": _series(lambda k: 1 / k, step=2),
    "sawtooth": _series(lambda k: 1 / k),
    "organ": {1: 1.0, 2: 0.8, 4: 0.6},
}
NOISE = "noise"
TIMBRES = (*PITCHED, NOISE)
"""The vocabulary of the prompts."""


def audible(harmonics: Harmonics, frequency: float) -> dict[int, float]:
    """Those harmonics of a tone at ``frequency`` Hz that lie below the band limit."""
    return {k: amplitude for k, amplitude in harmonics.items() if k * frequency < BAND_LIMIT}


def tone(harmonics: Harmonics, frequency: float, phase: float, samples: int) -> Array:
    """``samples`` of a steady tone with an RMS of one; ``phase`` in radians is the fundamental's."""
    angle = phase + 2 * np.pi * frequency / SAMPLE_RATE * np.arange(samples)
    wave: Array = sum(amplitude * np.sin(k * angle) for k, amplitude in audible(harmonics, frequency).items())
    wave /= np.sqrt(0.5 * sum(amplitude**2 for amplitude in audible(harmonics, frequency).values()))
    return wave
