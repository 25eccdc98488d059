"""Samples as files: images as PNG, waveforms as WAV."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

Writer = Callable[[Tensor, Path, int], list[str]]
"""Writes samples (B, ...) into a folder, numbered from a first one; the files' names relative to the folder."""


def writer(sample_rate: int | None) -> Writer:
    """For what a pipeline with this ``sample_rate`` makes, which is None for images."""
    return write_images if sample_rate is None else functools.partial(write_waveforms, sample_rate=sample_rate)


def write_images(samples: Tensor, directory: Path, first: int) -> list[str]:
    """PNG files of (B, 3, H, W) in [0, 1], numbered from ``first``; their names relative to ``directory``."""
    if samples.ndim != 4 or samples.shape[1] != 3:
        raise ValueError(f"samples of shape {tuple(samples.shape)} are not images: evaluate with output=None")
    names = _names(samples, directory, first, "images/{:05d}.png")
    pixels = samples.detach().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(directory / name)
    return names


def write_waveforms(samples: Tensor, directory: Path, first: int, sample_rate: int) -> list[str]:
    """WAV files in 16 bits of (B, channels, L) in [-1, 1], numbered as images are. Raises ValueError where soundfile is
    missing."""
    try:
        import soundfile
    except ImportError:
        raise ValueError("writing audio needs soundfile: pip install 'genalign[audio]'") from None
    if samples.ndim != 3:
        raise ValueError(f"samples of shape {tuple(samples.shape)} are not waveforms (B, channels, L)")
    names = _names(samples, directory, first, "audio/{:05d}.wav")
    for name, waveform in zip(names, samples.detach().float().clamp(-1, 1).cpu().numpy(), strict=True):
        soundfile.write(directory / name, waveform.T, sample_rate, subtype="PCM_16")
    return names


def _names(samples: Tensor, directory: Path, first: int, pattern: str) -> list[str]:
    names = [pattern.format(first + index) for index in range(len(samples))]
    (directory / names[0]).parent.mkdir(parents=True, exist_ok=True)
    return names
