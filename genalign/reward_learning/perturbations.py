"""Small changes of a sample that leave its content as it is, and statistics that should not decide about its quality.

A perturbation takes a sample, an image (3, H, W) in [0, 1] or a waveform (C, L) in [-1, 1], and a seed, and returns
one of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.metrics import audio, image
from genalign.runtime.media import as_jpeg
from genalign.runtime.waveforms import resample

Perturbation = Callable[[Tensor, int], Tensor]

NOISE = 0.02  # standard deviation, of an image's range
JPEG_QUALITY = 75
CROP = 0.05  # of each side
SCALE = 0.75  # of an image's sides
GAIN = -3.0  # dB
NOISE_LEVEL = -40.0  # dB of the clip's own level


def _with_noise(sample: Tensor, deviation: float | Tensor, seed: int, lowest: float) -> Tensor:
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed)).to(sample)
    return (sample + deviation * noise).clamp(lowest, 1)


def _crop(sample: Tensor, seed: int) -> Tensor:
    height, width = sample.shape[-2:]
    top, left = max(1, round(CROP * height)), max(1, round(CROP * width))
    return _resized(sample[:, top : height - top, left : width - left], (height, width))


def _resize(sample: Tensor, seed: int) -> Tensor:
    height, width = sample.shape[-2:]
    small = max(1, round(SCALE * height)), max(1, round(SCALE * width))
    return _resized(_resized(sample, small), (height, width))


def _resized(sample: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(sample[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


PERTURBATIONS: Mapping[str, Mapping[str, Perturbation]] = {
    "image": {
        "noise": lambda image, seed: _with_noise(image, NOISE, seed, 0),
        "JPEG": lambda image, seed: as_jpeg(image[None], JPEG_QUALITY)[0],
        "crop": _crop,
        "resize": _resize,
        "flip": lambda image, seed: image.flip(-1),
    },
    "audio": {
        "gain": lambda clip, seed: clip * 10 ** (GAIN / 20),
        "noise": lambda clip, seed: _with_noise(clip, clip.square().mean().sqrt() * 10 ** (NOISE_LEVEL / 20), seed, -1),
        # to three quarters of the rate, and back
        "resample": lambda clip, seed: resample(resample(clip, 4, 3), 3, 4)[..., : clip.shape[-1]].clamp(-1, 1),
    },
}
"""Perturbations by the name of the medium. A horizontal flip changes left and right, which a prompt may name."""


NUISANCES: Mapping[str, Mapping[str, Callable[[Tensor], Tensor]]] = {
    "image": {
        "brightness": image.brightness,
        "saturation": image.saturation,
        "contrast": image.contrast,
        "high frequencies": image.high_frequency,
        "object area": image.object_area,
        "pixels": lambda images: torch.full((len(images),), float(images.shape[-2] * images.shape[-1])),
    },
    "audio": {
        "level": audio.level,
        "crest": audio.crest,
        "spectral centroid": audio.spectral_centroid,
        "high frequencies": audio.high_frequency,
        "length": lambda clips: torch.full((len(clips),), float(clips.shape[-1])),
    },
}
"""Statistics (B,) of samples (B, ...) by the name of their medium."""
