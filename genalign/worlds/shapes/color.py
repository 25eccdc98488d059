"""Conversion to CIELAB, and the palette in it."""

from __future__ import annotations

from functools import cache

import numpy as np

from genalign.worlds.shapes.geometry import PALETTE, Array

_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ],
    np.float32,
)
_D65 = np.array([0.95047, 1.0, 1.08883], np.float32)


def srgb_to_lab(rgb: Array) -> Array:
    """Convert sRGB colors (..., 3, N) in [0, 255] to CIELAB (D65, IEC 61966-2-1), float32 (..., 3, N)."""
    if rgb.ndim < 2 or rgb.shape[-2] != 3:
        raise ValueError(f"rgb must be (..., 3, N), got {rgb.shape}")
    encoded = rgb.astype(np.float32) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = (_TO_XYZ / _D65[:, None]) @ linear
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0, :], f[..., 1, :], f[..., 2, :]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -2)


@cache
def palette_lab() -> Array:
    """Return the palette in CIELAB, (colors, 3), in its order."""
    return srgb_to_lab(np.array(list(PALETTE.values())).T).T


def nearest_color(lab: Array) -> tuple[Array, Array]:
    """Return the index (N,) of the nearest palette color of ``lab`` (N, 3), and the CIE76 distance (N,) to it."""
    distance = np.sqrt(((lab[:, None] - palette_lab()) ** 2).sum(2))
    index = distance.argmin(1)
    return index, distance[np.arange(len(index)), index]
