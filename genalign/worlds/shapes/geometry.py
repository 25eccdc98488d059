"""Outlines and colors of the shapes world.

A shape is an indicator function of (u, v), coordinates in units of the radius, v pointing down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Outline = Callable[[Array, Array], Array]

SIZE = 64
BACKGROUND = (150, 150, 150)

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 225, 50),
    "green": (45, 150, 65),
    "blue": (45, 85, 220),
    "purple": (150, 40, 150),
    "pink": (250, 150, 195),
    "brown": (115, 70, 35),
    "black": (20, 20, 20),
    "white": (248, 248, 248),
}


def _polygon(corners: list[tuple[float, float]]) -> Outline:
    """Even-odd rule; the corners are in order, the last joins the first."""

    def inside(u: Array, v: Array) -> Array:
        hit = np.zeros(np.broadcast(u, v).shape, bool)
        for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if v0 == v1:
                continue
            hit ^= ((v0 > v) != (v1 > v)) & (u < (u1 - u0) * (v - v0) / (v1 - v0) + u0)
        return hit

    return inside


def _disc(radius: float, u0: float = 0.0, v0: float = 0.0) -> Outline:
    return lambda u, v: (u - u0) ** 2 + (v - v0) ** 2 <= radius**2


def _star(points: int, outer: float, inner: float) -> Outline:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return _polygon([(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)])


SHAPES: dict[str, Outline] = {
    "circle": _disc(1.0),
    "square": _polygon([(-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)]),
    "triangle": _polygon([(0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)]),
    "cross": lambda u, v: (np.maximum(abs(u), abs(v)) <= 1.1) & (np.minimum(abs(u), abs(v)) <= 0.36),
    "ring": lambda u, v: _disc(1.08)(u, v) & ~_disc(0.58)(u, v),
    "moon": lambda u, v: _disc(1.12, 0.15)(u, v) & ~_disc(0.95, 0.72)(u, v),
}
"""The vocabulary of the prompts."""

REJECTS: dict[str, Outline] = {
    "diamond": _polygon([(0.0, -1.2), (1.0, 0.0), (0.0, 1.2), (-1.0, 0.0)]),
    "heart": lambda u, v: (
        _disc(0.58, -0.5, -0.4)(u, v)
        | _disc(0.58, 0.5, -0.4)(u, v)
        | _polygon([(-1.0, -0.1), (1.0, -0.1), (0.0, 1.1)])(u, v)
    ),
    "semicircle": lambda u, v: _disc(1.15, 0.0, 0.5)(u, v) & (v <= 0.5),
    "star": _star(5, 1.2, 0.5),
    "star4": _star(4, 1.2, 0.45),
}
"""Shapes that the verifier knows in order to refuse them."""
