"""Which shape a soft coverage mask is: soft IoU with rendered templates, rejects among them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from genalign.worlds.shapes.geometry import REJECTS, SHAPES, SIZE, Array, Outline

UNKNOWN = "unknown"
MIN_IOU = 0.66
REACH = 1.7  # half the window, in units of the radius of the disc of equal area
CELLS = 33
ANGLES = (-16, -8, 0, 8, 16)  # degrees
BLURS = (0.0, 0.08, 0.16)  # standard deviation, in the window's units


@dataclass(frozen=True)
class Matches:
    """The best template of M masks: its name ("unknown" for a reject or a poor fit) and its soft IoU."""

    names: tuple[str, ...]
    iou: Array


@cache
def templates() -> tuple[Array, list[str]]:
    """Every known shape and reject, turned and blurred: K masks (K, CELLS * CELLS), and the shape that each shows."""
    masks, names = [], []
    for (name, outline), angle in product((SHAPES | REJECTS).items(), ANGLES):
        sharp = _template(outline, np.deg2rad(angle))
        for blur in BLURS:
            masks.append(gaussian_filter(sharp, blur * (CELLS - 1) / (2 * REACH), mode="constant").ravel())
            names.append(name)
    return np.stack(masks), names


def match(coverage: Array) -> Matches:
    """Name M coverage masks (M, SIZE, SIZE) in [0, 1].

    Soft IoU = sum min(a, b) / sum max(a, b), which is (S - D) / (S + D) for S = sum a + sum b and D = sum |a - b|.
    """
    if coverage.ndim != 3 or coverage.shape[1:] != (SIZE, SIZE):
        raise ValueError(f"coverage must be (M, {SIZE}, {SIZE}), got {coverage.shape}")
    reference, shapes = templates()
    masks = normalized(coverage).reshape(len(coverage), -1)
    total = masks.sum(1)[:, None] + reference.sum(1)
    difference = cdist(masks, reference, "cityblock")
    iou = (total - difference) / (total + difference)
    best = iou.argmax(1)
    top = iou[np.arange(len(iou)), best]
    names = [shapes[k] for k in best]
    accepted = [name if name in SHAPES and fit >= MIN_IOU else UNKNOWN for name, fit in zip(names, top, strict=True)]
    return Matches(tuple(accepted), top)


def normalized(coverage: Array) -> Array:
    """Masks (M, SIZE, SIZE) moved to their centroid and scaled to the area of a unit disc, (M, CELLS, CELLS).

    Bilinear: every output row and column is a weighted sum of two input ones.
    """
    pixels = np.arange(SIZE)
    area = np.maximum(coverage.sum((1, 2)), 1.0)
    center_y = (coverage.sum(2) * pixels).sum(1) / area
    center_x = (coverage.sum(1) * pixels).sum(1) / area
    window = np.linspace(-REACH, REACH, CELLS) * np.sqrt(area / np.pi)[:, None]
    return _weights(center_y[:, None] + window) @ coverage @ _weights(center_x[:, None] + window).swapaxes(1, 2)


def _weights(positions: Array) -> Array:
    """Bilinear weights (M, CELLS, SIZE) of the pixel centers around ``positions`` (M, CELLS); none outside."""
    weights: Array = np.maximum(0, 1 - np.abs(positions[..., None] - np.arange(SIZE)))
    return weights


def _template(outline: Outline, angle: float, supersampling: int = 4) -> Array:
    """``outline`` turned about its centroid, in the window of ``normalized``: the covered share of each cell."""
    fine = np.linspace(-2, 2, 401)
    inside = outline(fine[None, :], fine[:, None])
    rows, columns = np.nonzero(inside)
    scale = np.sqrt(len(rows) * (fine[1] - fine[0]) ** 2 / np.pi)
    cell = 2 * REACH / (CELLS - 1)
    points = ((np.arange(CELLS * supersampling) + 0.5) / supersampling - CELLS / 2) * cell * scale
    u = np.cos(angle) * points[None, :] + np.sin(angle) * points[:, None] + fine[columns].mean()
    v = np.cos(angle) * points[:, None] - np.sin(angle) * points[None, :] + fine[rows].mean()
    covered: Array = outline(u, v).reshape(CELLS, supersampling, CELLS, supersampling).mean((1, 3))
    return covered
