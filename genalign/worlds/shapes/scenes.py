"""Scenes of colored shapes, their sampling from GenEval metadata, and their rendering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genalign.evaluation.geneval.scoring import relations
from genalign.types import Metadata
from genalign.worlds.shapes.geometry import BACKGROUND, PALETTE, REJECTS, SHAPES, SIZE, Array
from genalign.worlds.shapes.prompts import is_held_out_pair

SUPERSAMPLING = 4
OUTLINES = SHAPES | REJECTS
_DRAWS = 1000  # of which a few are needed
RELATION_MARGIN = 0.18  # stricter than the verifier's 0.1
_RADII = ((8.0, 12.0), (8.0, 12.0), (8.0, 11.0), (8.0, 10.0), (6.5, 9.0), (6.0, 8.0))  # for one to six items


@dataclass(frozen=True)
class Shape:
    """One shape: center and radius in pixels, y pointing down, ``rgb`` in [0, 255] (the palette's color, jittered)."""

    shape: str
    color: str
    x: float
    y: float
    r: float
    rgb: tuple[float, float, float]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The pixel box (x1, y1, x2, y2) that every outline stays within."""
        reach = 1.2 * self.r
        return self.x - reach, self.y - reach, self.x + reach, self.y + reach


@dataclass(frozen=True)
class Scene:
    """Shapes on a flat background; later items cover earlier ones."""

    items: tuple[Shape, ...]
    background: tuple[float, float, float] = BACKGROUND


def coverage(item: Shape) -> Array:
    """The share of each pixel that ``item`` covers, (SIZE, SIZE) in [0, 1], by 4 x 4 supersampling."""
    grid = (np.arange(SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x1, y1, x2, y2 = item.box
    cols, rows = _pixels(x1, x2), _pixels(y1, y2)
    u = (grid[cols.start * SUPERSAMPLING : cols.stop * SUPERSAMPLING] - item.x) / item.r
    v = (grid[rows.start * SUPERSAMPLING : rows.stop * SUPERSAMPLING] - item.y) / item.r
    mask = OUTLINES[item.shape](u[None, :], v[:, None])
    out = np.zeros((SIZE, SIZE), np.float32)
    height, width = rows.stop - rows.start, cols.stop - cols.start
    out[rows, cols] = mask.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean((1, 3))
    return out


def _pixels(low: float, high: float) -> slice:
    return slice(max(0, int(low) - 1), min(SIZE, int(high) + 2))


def render(scenes: Sequence[Scene]) -> Tensor:
    """Images (B, 3, 64, 64) in [0, 1], rounded to 8 bits."""
    out = np.empty((len(scenes), SIZE, SIZE, 3), np.float32)
    for canvas, scene in zip(out, scenes, strict=True):
        canvas[:] = scene.background
        for item in scene.items:
            alpha = coverage(item)[..., None]
            canvas *= 1 - alpha
            canvas += alpha * np.asarray(item.rgb, np.float32)
    return torch.from_numpy(out).round_().div_(255).permute(0, 3, 1, 2).contiguous()


def render_metadata(metadata: Sequence[Metadata], rng: np.random.Generator) -> Tensor:
    """Images (B, 3, 64, 64) of random scenes, for each of which its metadata (B) are exactly true."""
    return render([sample_scene(item, rng) for item in metadata])


def sample_scene(metadata: Metadata, rng: np.random.Generator, hold_out: bool = True) -> Scene:
    """A scene for which GenEval ``metadata`` is exactly true. Raises ValueError where none is found in 1000 draws.

    ``hold_out`` keeps held-out (shape, color) pairs away from objects whose color the prompt leaves open, as every
    training scene must.
    """
    names = _colored(metadata, rng, hold_out)
    relation = next((clause["position"][0] for clause in metadata["include"] if "position" in clause), None)
    if not 1 <= len(names) <= len(_RADII) or (relation and len(names) != 2):
        raise ValueError(
            f"no scene has {len(names)} objects as in {metadata}: a scene has 1 to {len(_RADII)}, a relation 2"
        )
    for _ in range(_DRAWS):
        items = _place(names, rng)
        if items and (not relation or relation in relations(items[1].box, items[0].box, RELATION_MARGIN)):
            break
    else:
        raise ValueError(f"{_DRAWS} draws gave no scene for {metadata}: ask for fewer objects, or another relation")
    order = rng.permutation(len(items))
    background = tuple(float(c + d) for c, d in zip(BACKGROUND, np.full(3, rng.uniform(-6, 6)), strict=True))
    return Scene(tuple(items[i] for i in order), (background[0], background[1], background[2]))


def _colored(metadata: Metadata, rng: np.random.Generator, hold_out: bool) -> list[tuple[str, str]]:
    """List the shape and color of every object of ``metadata``, with the colors drawn that it leaves open."""
    names: list[tuple[str, str]] = []
    for clause in metadata["include"]:
        for _ in range(clause["count"]):
            shape, color = clause["class"], clause.get("color")
            if not color:
                free = [color for color in PALETTE if not (hold_out and is_held_out_pair(shape, color))]
                color = free[rng.integers(len(free))]
            names.append((shape, color))
    return names


def jittered(color: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """The palette's color with every channel moved by up to 8."""
    red, green, blue = np.clip(np.asarray(PALETTE[color]) + rng.uniform(-8, 8, 3), 0, 255)
    return float(red), float(green), float(blue)


def _place(names: Sequence[tuple[str, str]], rng: np.random.Generator) -> list[Shape] | None:
    """Place objects with at least 3 px between their boxes; None if this draw has no room for all."""
    items: list[Shape] = []
    for shape, color in names:
        for _ in range(60):
            r = rng.uniform(*_RADII[len(names) - 1])
            margin = 1.2 * r + 1
            x, y = rng.uniform(margin, SIZE - margin, 2)
            item = Shape(shape, color, float(x), float(y), float(r), jittered(color, rng))
            (x1, y1, x2, y2), boxes = item.box, [other.box for other in items]
            if all(max(x1 - box[2], box[0] - x2, y1 - box[3], box[1] - y2) >= 3.0 for box in boxes):
                items.append(item)
                break
        else:
            return None
    return items
