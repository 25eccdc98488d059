"""Reference clips from files, good and bad."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from genalign.runtime.media import read_waveform
from genalign.runtime.waveforms import warn_once
from genalign.types import Prompt
from rewards.backbones.audio_features import LogMelFeatures, extract_frame_features
from rewards.backbones.image_features import extract_features
from rewards.backbones.reference_audio import AudioFolder, AudioTensor
from rewards.backbones.reference_images import ReferencePool


def write(path: Path, rate: int = 8000, seconds: float = 1.0, channels: int = 1, hz: float = 440.0) -> None:
    wave = 0.5 * np.sin(2 * math.pi * hz * np.arange(round(rate * seconds)) / rate)
    soundfile.write(path, np.stack([wave] * channels, 1), rate, subtype="PCM_16")


def test_wav_and_flac_are_read(tmp_path: Path) -> None:
    write(tmp_path / "b.wav")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.FLAC", hz=880)
    (tmp_path / "prompts.jsonl").write_text("{}")
    clips = AudioFolder(tmp_path, 8000)
    assert clips.names == ("b.wav", "sub/a.FLAC") and len(clips) == 2
    loaded = clips.load([0, 1])
    assert loaded.shape == (2, 1, 8000) and loaded.dtype == torch.float32
    expected = torch.from_numpy(0.5 * np.sin(2 * math.pi * 440 * np.arange(8000) / 8000)).float()
    torch.testing.assert_close(loaded[0, 0], expected, rtol=0, atol=1e-4)
    result = read_waveform(tmp_path / "b.wav")
    assert result.sample_rate == 8000 and torch.equal(result.waveform, loaded[0])
    drawn = clips.load(ReferencePool(clips).choose([Prompt("x")] * 3, torch.Generator().manual_seed(0)))
    assert drawn.shape == (3, 1, 8000)


def test_stereo_other_rates_and_silence_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav", rate=44100, channels=2)
    soundfile.write(tmp_path / "c.wav", np.zeros(8000), 8000)
    with caplog.at_level(logging.WARNING):
        loaded = AudioFolder(tmp_path, 8000).load([0, 1, 2])
    torch.testing.assert_close(loaded[0, 0, 800:-800], loaded[1, 0, 800:-800], rtol=0, atol=1e-3)
    assert "hears one channel: the mean of 2 is taken" in caplog.text
    assert "hears 8000 Hz: waveforms at 44100 Hz are resampled" in caplog.text
    assert f"the reference {tmp_path / 'c.wav'} is silent" in caplog.text


def test_clips_of_different_lengths_need_seconds(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", seconds=1.0)
    write(tmp_path / "b.wav", seconds=0.5)
    clips = AudioFolder(tmp_path, 8000)
    with pytest.raises(ValueError, match=r"different lengths \(1\.00 s, but b\.wav 0\.50 s\): give seconds="):
        clips.load([0, 1])
    assert AudioFolder(tmp_path, 8000, seconds=0.25).load([0, 1]).shape == (2, 1, 2000)
    with pytest.raises(ValueError, match=r"b\.wav lasts 0\.50 s, less than seconds=0\.75: lower it"):
        AudioFolder(tmp_path, 8000, seconds=0.75).load([0, 1])
    frames = extract_frame_features(clips, LogMelFeatures(8000, mels=8))  # lengths may differ there
    assert frames.shape == (8000 // 128 + 1 + 4000 // 128 + 1, 8)


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    """No set of clips, but enough for one of frames."""
    write(tmp_path / "a.wav")
    clips, encoder = AudioFolder(tmp_path, 8000), LogMelFeatures(8000, mels=8)
    with pytest.raises(ValueError, match=r"needs 2 samples or more, got 1: one has no .*extract_frame_features"):
        extract_features(clips, encoder)
    assert len(extract_frame_features(clips, encoder)) == 63


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF but no more")
    with pytest.raises(ValueError, match=r"expected audio \(WAV or FLAC\), but .*a\.wav cannot be read as such"):
        AudioFolder(tmp_path, 8000).load([0])
    wave = np.zeros(100, np.float32)
    wave[3] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav holds NaN or infinite samples: leave it out"):
        AudioFolder(tmp_path, 8000).load([0])
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 8000)
    with pytest.raises(ValueError, match=r"a\.wav has no samples"):
        AudioFolder(tmp_path, 8000).load([0])
    with pytest.raises(FileNotFoundError, match=r"there is no .*missing\.wav"):
        read_waveform(tmp_path / "missing.wav")


def test_waveforms_in_memory() -> None:
    clips = AudioTensor(torch.randn(3, 2, 50).clamp(-1, 1))
    assert len(clips) == 3 and clips.load([2, 0]).shape == (2, 2, 50)
    with pytest.raises(ValueError, match="no reference clips: give at least one"):
        AudioTensor(torch.zeros(0, 1, 10))
    with pytest.raises(ValueError, match="reference clips must be finite"):
        AudioTensor(torch.full((1, 1, 10), math.nan))
    with pytest.raises(ValueError, match=r"waveforms must be \(B, C, L\)"):
        AudioTensor(torch.zeros(3, 50))
