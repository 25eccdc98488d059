"""From a waveform to a list of sounding events, without learned weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genalign.worlds.tones.instruments import LENGTH, SAMPLE_RATE, Array
from genalign.worlds.tones.spectrum import Sound, describe

WINDOW = 160  # samples of the level's window: 20 ms
HOP = 32  # 4 ms
SILENCE_DB = -55.0  # a clip whose peak level is below this has no event
DYNAMICS_DB = 10.0  # a clip with less between peak and floor is one sound from end to end
ABOVE_FLOOR_DB = 8.0
BELOW_PEAK_DB = 32.0
MAX_GAP = 0.030  # seconds; shorter ones are closed
MIN_EVENT = 0.060  # seconds; shorter ones are dropped
TRIM = 0.010  # seconds at either end that are ignored: the ramps


@dataclass(frozen=True)
class ToneDetection:
    """One event: from ``onset`` to ``offset`` in seconds, at ``level`` dB of full scale (RMS), and its sound."""

    onset: float
    offset: float
    level: float
    sound: Sound


def detect(waveforms: Tensor) -> list[tuple[ToneDetection, ...]]:
    """Detect the events of each clip, in order of time.

    Args:
        waveforms: (B, 1, 12000) at 8 kHz, floating point; moved to the CPU.

    Raises:
        ValueError: for another shape, or samples that are NaN or infinite.
        TypeError: for integer waveforms.
    """
    if waveforms.ndim != 3 or waveforms.shape[1:] != (1, LENGTH):
        raise ValueError(f"waveforms must be (B, 1, {LENGTH}) at {SAMPLE_RATE} Hz, got {tuple(waveforms.shape)}")
    if not waveforms.is_floating_point():
        raise TypeError(f"waveforms must be floating point in [-1, 1], got {waveforms.dtype}")
    samples = waveforms.detach().to("cpu", torch.float64).numpy()[:, 0]
    if not np.isfinite(samples).all():
        raise ValueError("waveforms hold NaN or infinite samples: score such samples as failed, do not verify them")
    trim = round(TRIM * SAMPLE_RATE)
    detections: list[tuple[ToneDetection, ...]] = []
    for clip in samples:
        events = []
        for start, stop in segments(clip):
            segment = clip[start + trim : stop - trim]
            level = 10 * np.log10(max(float(np.mean(segment**2)), 1e-12))
            events.append(ToneDetection(start / SAMPLE_RATE, stop / SAMPLE_RATE, level, describe(segment)))
        detections.append(tuple(events))
    return detections


def levels(clip: Array) -> Array:
    """RMS in dB of full scale of windows of 20 ms every 4 ms, centered, so window i is about sample 32 i."""
    squares = np.concatenate([[0.0], np.cumsum(np.pad(clip, WINDOW // 2) ** 2)])
    means = (squares[WINDOW::HOP] - squares[:-WINDOW:HOP]) / WINDOW
    decibels: Array = 10 * np.log10(np.maximum(means, 1e-12))
    return decibels


def segments(clip: Array) -> list[tuple[int, int]]:
    """The half-open sample range of every segment above the noise floor."""
    level = levels(clip)
    floor, peak = np.percentile(level, (8, 99.5))
    if peak < SILENCE_DB:
        return []
    threshold = peak - 3
    if peak - floor > DYNAMICS_DB:
        threshold = min(max(floor + ABOVE_FLOOR_DB, peak - BELOW_PEAK_DB), peak - 6)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], level > threshold, [False]])))
    runs = _close_gaps([(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)], MAX_GAP * SAMPLE_RATE / HOP)
    shortest = MIN_EVENT * SAMPLE_RATE / HOP
    return [(start * HOP, min(stop * HOP, len(clip))) for start, stop in runs if stop - start >= shortest]


def _close_gaps(runs: list[tuple[int, int]], gap: float) -> list[tuple[int, int]]:
    """Join neighbors with less than ``gap`` between them."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and start - joined[-1][1] < gap:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
