"""Samples as files: images as PNG, waveforms as WAV or FLAC; and the reading of such files."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MOST_PIXELS = 2**26
"""Of an image that is read; one of 8192 x 8192."""

MOST_SAMPLES = 2**28
"""Of all channels of a recording that is read: 1 GiB in float32, 46 minutes in stereo at 48 kHz."""

AudioFormat = Literal["wav", "flac"]
AUDIO_SUFFIXES = frozenset({".wav", ".flac"})

_FORMATS = ("PNG", "JPEG", "WEBP")
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)  # of Pillow

Writer = Callable[[Tensor, Path, int], list[str]]
"""Writes samples (B, ...) into a folder, numbered from a first one; the files' names relative to the folder."""


def writer(sample_rate: int | None, audio: AudioFormat = "wav") -> Writer:
    """For what a pipeline with this ``sample_rate`` makes, which is None for images; ``audio`` is for waveforms."""
    if sample_rate is None:
        return write_images
    return functools.partial(write_waveforms, sample_rate=sample_rate, audio=audio)


def write_images(samples: Tensor, directory: Path, first: int) -> list[str]:
    """PNG files of (B, 3, H, W) in [0, 1], numbered from ``first``; their names relative to ``directory``."""
    if samples.ndim != 4 or samples.shape[1] != 3:
        raise ValueError(f"samples of shape {tuple(samples.shape)} are not images: evaluate with output=None")
    names = _names(samples, directory, first, "images/{:05d}.png")
    save_images(samples, [directory / name for name in names])
    return names


def save_images(images: Tensor, paths: Sequence[Path]) -> None:
    """One PNG file for each of images (n, 3, H, W) in [0, 1]."""
    for path, pixels in zip(paths, eight_bits(images).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        Image.fromarray(pixels).save(path)


def eight_bits(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [0, 1] as the uint8 that a PNG file of them holds; NaN is black."""
    return images.detach().float().nan_to_num().clamp(0, 1).mul(255).round().byte()


@contextlib.contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """A PNG, JPEG or WebP file, whose pixels are not decoded yet. Raises ValueError for one that is damaged, of another
    kind, or over ``MOST_PIXELS``."""
    try:
        with Image.open(path, formats=_FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(f"{path} has {file.width} x {file.height} pixels, over {MOST_PIXELS}: make it smaller")
            yield file
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): make it again") from error


def read_image(path: Path) -> Tensor:
    """An image file (3, H, W) in [0, 1], turned as its EXIF data says. Raises ValueError as ``opened_image``."""
    with opened_image(path) as file:
        pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def inside(folder: Path, name: str) -> Path:
    """The file of that ``name`` in ``folder``. Raises ValueError for a name that leads out of it."""
    plain = os.path.normpath(name)
    if os.path.isabs(plain) or plain.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{name!r} leads out of {folder}: name a file in it")
    return folder / plain


def write_waveforms(
    samples: Tensor, directory: Path, first: int, sample_rate: int, audio: AudioFormat = "wav"
) -> list[str]:
    """WAV or FLAC files in 16 bits of (B, channels, L) in [-1, 1], numbered as images are; NaN is silence. Raises
    ValueError for another shape, and where soundfile is missing."""
    if samples.ndim != 3:
        raise ValueError(f"samples of shape {tuple(samples.shape)} are not waveforms (B, channels, L)")
    _soundfile()
    names = _names(samples, directory, first, f"audio/{{:05d}}.{audio}")
    for name, waveform in zip(names, samples, strict=True):
        (directory / name).write_bytes(encoded(Recording(waveform, sample_rate), audio))
    return names


@dataclass(frozen=True)
class Recording:
    """A ``waveform`` (C, L) in [-1, 1], float32, at ``sample_rate`` Hz."""

    waveform: Tensor
    sample_rate: int


def encoded(recording: Recording, audio: AudioFormat) -> bytes:
    """The bytes of a WAV or FLAC file in 16 bits. Raises ValueError where soundfile is missing."""
    samples = recording.waveform.detach().float().nan_to_num().clamp(-1, 1).cpu().numpy().T
    buffer = BytesIO()
    _soundfile().write(buffer, samples, recording.sample_rate, subtype="PCM_16", format=audio.upper())
    return buffer.getvalue()


def read_waveform(path: Path) -> Recording:
    """A WAV or FLAC file. Raises FileNotFoundError, and ValueError for one that cannot be read, is empty or holds
    samples that are not finite, and where soundfile is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    soundfile = _soundfile()
    try:
        about = soundfile.info(path)
        if about.frames * about.channels > MOST_SAMPLES:
            raise ValueError(f"{path} has {about.frames} x {about.channels} samples, over {MOST_SAMPLES}: cut it")
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"expected audio (WAV or FLAC), but {path} cannot be read as such: {error}") from None
    waveform = torch.from_numpy(samples.T.copy())
    if not waveform.numel():
        raise ValueError(f"{path} has no samples: leave it out")
    if not bool(waveform.isfinite().all()):
        raise ValueError(f"{path} holds NaN or infinite samples: leave it out, or write it anew")
    return Recording(waveform, int(rate))


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError:
        raise ValueError("audio files need soundfile: pip install 'genalign[audio]'") from None
    return soundfile


def _names(samples: Tensor, directory: Path, first: int, pattern: str) -> list[str]:
    names = [pattern.format(first + index) for index in range(len(samples))]
    (directory / names[0]).parent.mkdir(parents=True, exist_ok=True)
    return names
