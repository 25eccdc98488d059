"""Reads audio files of other programs as clips of the tones world."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from genalign.runtime.media import read_waveform
from genalign.runtime.waveforms import as_heard, warn_once
from genalign.worlds.tones.instruments import LENGTH, SAMPLE_RATE
from genalign.worlds.tones.scenes import MARGIN


def read_clip(path: Path) -> Tensor:
    """Read a WAV or FLAC file as the verifier takes it, (1, 12000): one channel of 1.5 s at 8 kHz.

    Channels are mixed down, other rates resampled and shorter clips padded with silence, with a line in the log. Raises
    ValueError for a file that is longer or cannot be read.
    """
    audio = read_waveform(path)
    clip = as_heard(audio.waveform[None], audio.sample_rate, SAMPLE_RATE, "the tones world's verifier")
    missing, seconds = LENGTH - clip.shape[1], LENGTH / SAMPLE_RATE
    if -missing > MARGIN * SAMPLE_RATE:
        lasts = clip.shape[1] / SAMPLE_RATE
        raise ValueError(f"{path} lasts {lasts:.2f} s: clips of the tones world last {seconds:g} s; cut it")
    if missing > 0:
        warn_once(f"clips of the tones world last {seconds:g} s: shorter ones, such as {path}, are padded with silence")
    return F.pad(clip[:, :LENGTH], (0, max(0, missing)))
