"""Statistics of sounds, against values that are known."""

from __future__ import annotations

import math

import pytest
import torch

from genalign.metrics.audio import clipped, crest, high_frequency, level, silent, spectral_centroid


def sine(amplitude: float, frequency: float = 100.0) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(8192) / 8192)[None, None]


def test_levels_of_sines() -> None:
    assert float(level(sine(1.0))) == pytest.approx(-3.0103, abs=1e-3)
    assert float(level(sine(0.1))) == pytest.approx(-23.0103, abs=1e-3)
    assert float(crest(sine(0.1))) == pytest.approx(3.0103, abs=1e-2)
    assert float(crest(sine(4.0).clamp(-1, 1))) < 1.0
    stereo = torch.cat([sine(1.0), torch.zeros(1, 1, 8192)], 1)
    assert float(level(stereo)) == pytest.approx(-6.0206, abs=1e-3)


def test_silence_has_finite_values() -> None:
    nothing = torch.zeros(1, 1, 1000)
    assert float(level(nothing)) == pytest.approx(-100, abs=1e-3)
    assert float(crest(nothing)) == pytest.approx(0, abs=1e-3)
    assert float(silent(nothing)) == 1 and float(clipped(nothing)) == 0
    assert math.isfinite(float(high_frequency(nothing)))


def test_shares() -> None:
    half = torch.cat([sine(0.5), torch.zeros(1, 1, 8192)], 2)
    assert float(silent(half)) == 0.5
    assert float(clipped(sine(2.0).clamp(-1, 1))) == pytest.approx(2 / 3, abs=0.01)  # |sin| >= 1/2
    assert float(clipped(sine(0.9))) == 0


def test_high_frequencies() -> None:
    low, high = high_frequency(sine(0.5, 1000)), high_frequency(sine(0.5, 3000))
    assert float(high) == pytest.approx(0, abs=1e-3) and float(low) < -5


@pytest.mark.parametrize("statistic", [level, crest, high_frequency, clipped, silent, spectral_centroid])
def test_a_failed_clip_is_nan_and_no_other(statistic: object) -> None:
    waves = sine(0.5).repeat(3, 2, 1)
    waves[1, 1, 7] = math.nan
    assert callable(statistic)
    assert statistic(waves).isnan().tolist() == [False, True, False]


def test_the_centroid_of_sines() -> None:
    """8192 samples a second, so that half of the Nyquist frequency is 2048."""
    assert float(spectral_centroid(sine(0.5, 2048))) == pytest.approx(0.5, abs=1e-4)
    both = sine(0.5, 1024) + sine(0.5, 3072)
    assert float(spectral_centroid(both)) == pytest.approx(0.5, abs=1e-4)
    assert float(spectral_centroid(torch.zeros(1, 1, 100))) == 0
