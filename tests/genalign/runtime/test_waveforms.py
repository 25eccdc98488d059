"""Channels, rates and spectra of waveforms."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from genalign.runtime.waveforms import as_heard, mel_decibels, require_waveforms, resample, warn_once


def sine(frequency: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * rate)).double() / rate).float()


@pytest.mark.parametrize(
    ("rate", "wanted"), [(8000, 48000), (48000, 8000), (44100, 16000), (22050, 24000), (8000, 8000)]
)
def test_a_tone_is_the_same_tone_at_another_rate(rate: int, wanted: int) -> None:
    made, true = resample(sine(1000, rate)[None], rate, wanted)[0], sine(1000, wanted)
    assert made.shape == true.shape
    inner = slice(wanted // 10, -wanted // 10)
    torch.testing.assert_close(made[inner], true[inner], rtol=0, atol=1e-4)


def test_what_the_lower_rate_cannot_hold_is_gone() -> None:
    kept, lost = (resample(sine(f, 48000), 48000, 8000).std() for f in (3000, 5000))
    assert kept == pytest.approx(math.sqrt(0.5), rel=0.01)
    assert lost < 1e-2  # its ends, where it sets in; the inside is below -90 dB
    assert resample(sine(5000, 48000), 48000, 8000)[800:-800].abs().max() < 3e-5


def test_lengths_and_gradients() -> None:
    waves = torch.randn(2, 3, 1001, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made = resample(waves, 44100, 48000)
    assert made.shape == (2, 3, math.ceil(1001 * 48000 / 44100))
    made.square().sum().backward()
    assert waves.grad is not None and bool(waves.grad.abs().amin((0, 1)).gt(0).all())
    with pytest.raises(ValueError, match="a sample rate must be a positive number of Hz, not 0 and 8000"):
        resample(waves, 0, 8000)


def test_mixing_and_resampling_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    stereo = torch.stack([sine(500, 8000), torch.zeros(8000)])[None]
    with caplog.at_level(logging.WARNING):
        made = as_heard(stereo, 8000, 16000, "the ear")
        as_heard(stereo, 8000, 16000, "the ear")
    assert caplog.messages == [
        "the ear hears one channel: the mean of 2 is taken",
        "the ear hears 16000 Hz: waveforms at 8000 Hz are resampled, and nothing above 4000 Hz is heard",
    ]
    torch.testing.assert_close(made[0, 2000:-2000], 0.5 * sine(500, 16000)[2000:-2000], rtol=0, atol=1e-4)


def test_what_is_no_waveform_is_refused() -> None:
    with pytest.raises(ValueError, match=r"waveforms must be \(B, C, L\) in \[-1, 1\], not a tensor of shape \(2, 5\)"):
        require_waveforms(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="waveforms must be"):
        require_waveforms(torch.zeros(2, 1, 0))
    with pytest.raises(TypeError, match=r"floating point in \[-1, 1\], not torch\.int16"):
        require_waveforms(torch.zeros(2, 1, 5, dtype=torch.int16))


def test_a_clip_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a clip of 300 samples is shorter than a window of 512: give longer clips"):
        mel_decibels(torch.zeros(1, 300), torch.zeros(257, 4), 512, 128)


def test_silence_is_the_floor_of_the_spectrum() -> None:
    assert (mel_decibels(torch.zeros(2, 600), torch.rand(257, 4), 512, 128) == -100).all()
