"""From pixels to a list of colored shapes, without learned weights.

Denoise, CIELAB, foreground against the border's median, seeds of one palette color, growth to whole regions, and
soft coverage, which ``template_matching`` classifies. Everything is computed for a batch at once; images are
independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from genalign.worlds.shapes.color import nearest_color, palette_lab, srgb_to_lab
from genalign.worlds.shapes.geometry import PALETTE, SIZE, Array
from genalign.worlds.shapes.template_matching import match

FOREGROUND_DELTA_E = 14.0
MIN_COMPONENT_AREA = 25
MIN_SEED_AREA = 12
MIN_SEED_SHARE = 0.12  # of the pixels of its component that have a palette color
CORE_SHARE = 0.5  # of the way from the background to the palette's color
HALO = 2  # pixels around a region that may hold its soft edge
PEAK = 0.9  # the quantile of a region's colors that counts as fully covered
_CHUNK = 16
_COLORS = tuple(PALETTE)
_BY_IMAGE_8 = np.zeros((3, 3, 3), bool)  # neighbors in the plane, none along the batch
_BY_IMAGE_8[1] = True
_BY_IMAGE_4 = ndimage.generate_binary_structure(3, 1) & _BY_IMAGE_8
_FRAME = np.pad(np.zeros((SIZE - 4, SIZE - 4), bool), 2, constant_values=True)


@dataclass(frozen=True)
class ShapeDetection:
    """One detected object.

    Attributes:
        shape: The best template, or "unknown" if none fits.
        color: The nearest palette color.
        box: The half-open pixel box (x1, y1, x2, y2).
        iou: The soft IoU with the best template.
        delta_e: The CIE76 distance to the palette color.
        area: The soft coverage in pixels.
    """

    shape: str
    color: str
    box: tuple[float, float, float, float]
    iou: float
    delta_e: float
    area: float


@dataclass(frozen=True)
class _Canvas:
    """CIELAB offsets from the background (B, 3, SIZE, SIZE), their length (B, SIZE, SIZE), the background (B, 3)."""

    offset: Array
    distance: Array
    background: Array


@dataclass(frozen=True)
class _Colors:
    """For M objects: the offset of their color from the background (M, 3), palette index (M,), distance to it (M,)."""

    offset: Array
    index: Array
    delta_e: Array


def detect(images: Tensor) -> list[tuple[ShapeDetection, ...]]:
    """Detect the objects of each image, best template fit first.

    Args:
        images: (B, 3, 64, 64), floating point; clamped to [0, 1], moved to the CPU.

    Raises:
        ValueError: for another shape, or NaN pixels.
        TypeError: for integer images.
    """
    pixels = _pixels(images)
    chunks = [pixels[start : start + _CHUNK] for start in range(0, len(pixels), _CHUNK)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return [detections for chunk in pool.map(_detect, chunks) for detections in chunk]


def _pixels(images: Tensor) -> Array:
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"images must be (B, 3, {SIZE}, {SIZE}), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}: divide 8-bit images by 255")
    if images.isnan().any():
        raise ValueError("images contain NaN: drop the failed samples")
    pixels: Array = (images.detach().to("cpu", torch.float32).clamp(0, 1) * 255).numpy()
    return pixels


def _detect(pixels: Array) -> list[tuple[ShapeDetection, ...]]:
    pixels = _denoised(pixels)
    lab = srgb_to_lab(pixels.reshape(len(pixels), 3, -1))
    background = srgb_to_lab(np.median(pixels[:, :, _FRAME], 2)[..., None])
    offset = (lab - background).reshape(pixels.shape)
    canvas = _Canvas(offset, np.sqrt((offset**2).sum(1)), background[..., 0])
    components = _components(canvas.distance)
    objects = _grown(components, _seeds(components, _shades(canvas, components)))
    places = ndimage.find_objects(objects)
    image = np.array([place[0].start for place in places], int)
    detections: list[list[ShapeDetection]] = [[] for _ in pixels]
    if places:
        colors = _colors(canvas, objects, image)
        coverage = _coverage(canvas, objects, image, colors.offset)
        matches, area = match(coverage), coverage.sum((1, 2))
        for m, (_, rows, columns) in enumerate(places):
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            color, delta_e = _COLORS[colors.index[m]], float(colors.delta_e[m])
            detections[image[m]].append(
                ShapeDetection(matches.names[m], color, box, float(matches.iou[m]), delta_e, float(area[m]))
            )
    return [tuple(sorted(group, key=lambda detection: -detection.iou)) for group in detections]


def _denoised(pixels: Array) -> Array:
    """Smooth the images whose noise, estimated by the median absolute Laplacian, is above 4 of 255 levels."""
    inner = pixels[..., 1:-1, 1:-1]
    around = pixels[..., :-2, 1:-1] + pixels[..., 2:, 1:-1] + pixels[..., 1:-1, :-2] + pixels[..., 1:-1, 2:]
    laplacian = np.abs(around - 4 * inner).reshape(len(pixels), -1)
    noise = np.median(laplacian, 1) / (0.6745 * np.sqrt(20.0))
    some, much = (noise >= 4) & (noise < 12), noise >= 12
    out = pixels.copy()
    out[some] = ndimage.gaussian_filter(pixels[some], (0, 0, 0.6, 0.6))
    # The 3 x 3 median: of the sorted columns, the median of the largest low, the middle and the smallest high value
    smooth = ndimage.gaussian_filter(pixels[much], (0, 0, 0.7, 0.7))
    padded = np.pad(smooth, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    low, middle, high = _sorted_3(padded[..., :-2, :], padded[..., 1:-1, :], padded[..., 2:, :])
    nine = _sorted_3(*_shifted(low))[2], _sorted_3(*_shifted(middle))[1], _sorted_3(*_shifted(high))[0]
    out[much] = _sorted_3(*nine)[1]
    return out


def _shifted(plane: Array) -> tuple[Array, Array, Array]:
    return plane[..., :-2], plane[..., 1:-1], plane[..., 2:]


def _sorted_3(a: Array, b: Array, c: Array) -> tuple[Array, Array, Array]:
    low, high = np.minimum(a, b), np.maximum(a, b)
    return np.minimum(low, c), np.maximum(low, np.minimum(high, c)), np.maximum(high, c)


def _components(distance: Array) -> Array:
    """8-connected foreground components (B, SIZE, SIZE), numbered from 1; specks removed by a 2 x 2 opening."""
    mask = distance > FOREGROUND_DELTA_E
    whole = mask[:, :-1, :-1] & mask[:, :-1, 1:] & mask[:, 1:, :-1] & mask[:, 1:, 1:]
    opened = np.zeros_like(mask)
    for dy, dx in product((0, 1), repeat=2):
        opened[:, dy : SIZE - 1 + dy, dx : SIZE - 1 + dx] |= whole
    labels: Array = ndimage.label(opened, _BY_IMAGE_8)[0]
    large = np.bincount(labels.ravel()) >= MIN_COMPONENT_AREA
    large[0] = False
    return labels * large[labels]


def _shades(canvas: _Canvas, components: Array) -> Array:
    """1 + the nearest palette color where a component's pixel is past the half-way point to it, else 0.

    Blends of an edge, which resemble other colors, are mostly not.
    """
    image, rows, columns = np.nonzero(components)
    lab = canvas.offset[image, :, rows, columns] + canvas.background[image]
    index, _ = nearest_color(lab)
    reach = np.linalg.norm(palette_lab() - canvas.background[:, None], axis=2)
    core = canvas.distance[image, rows, columns] > CORE_SHARE * reach[image, index]
    shades = np.zeros_like(components)
    shades[image, rows, columns] = np.where(core, index + 1, 0)
    return shades


def _seeds(components: Array, shades: Array) -> Array:
    """At the pixels of every solid patch of one color, the key of its (component, color); 0 elsewhere."""
    opened = np.where(np.logical_or.reduce([inner := _inner(shades), *_neighbors(inner)]), shades, 0)
    patches = _patches(opened)
    size = np.bincount(patches.ravel())
    core = np.bincount(components[shades > 0], minlength=components.max() + 1)
    needed = np.maximum(MIN_SEED_AREA, MIN_SEED_SHARE * core)
    solid = (patches > 0) & (size[patches] >= needed[components])
    motley = core >= MIN_COMPONENT_AREA
    motley[components[solid]] = False
    seeds = np.where(solid, components * (len(_COLORS) + 1) + shades, 0)
    return np.where(motley[components] & (shades > 0), components * (len(_COLORS) + 1), seeds)


def _neighbors(plane: Array) -> Iterator[Array]:
    """The values above, below, left and right of each pixel of (B, SIZE, SIZE); 0 beyond the border."""
    padded = np.pad(plane, ((0, 0), (1, 1), (1, 1)))
    yield from (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])


def _inner(labels: Array) -> Array:
    """True where a labeled pixel and its four neighbors have one label."""
    inner: Array = np.logical_and.reduce([labels > 0, *(other == labels for other in _neighbors(labels))])
    return inner


def _patches(labels: Array) -> Array:
    """4-connected components of equal labels, numbered from 1: pixels are joined by cells put between them."""
    batch = len(labels)
    cells = np.zeros((batch, 2 * SIZE - 1, 2 * SIZE - 1), bool)
    cells[:, ::2, ::2] = labels > 0
    cells[:, 1::2, ::2] = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] > 0)
    cells[:, ::2, 1::2] = (labels[:, :, 1:] == labels[:, :, :-1]) & (labels[:, :, 1:] > 0)
    patches: Array = ndimage.label(cells, _BY_IMAGE_4)[0]
    return patches[:, ::2, ::2]


def _grown(components: Array, seeds: Array) -> Array:
    """Objects (B, SIZE, SIZE), numbered from 1: every pixel of a component joins the nearest of its seeds."""
    keys = np.unique(seeds[seeds > 0])
    owner = keys // (len(_COLORS) + 1)
    key_of = np.zeros(components.max() + 1, int)
    key_of[owner] = keys
    objects = key_of[components]
    places = ndimage.find_objects(components)
    for component in np.unique(owner[1:][owner[1:] == owner[:-1]]):  # components of several colors
        place = places[component - 1]
        own = components[place] == component
        near = np.where(own, seeds[place], 0)[0]
        nearest = ndimage.distance_transform_edt(near == 0, return_distances=False, return_indices=True)
        objects[place][own] = near[tuple(nearest)][own[0]]
    keys = np.unique(objects[objects > 0])
    return np.searchsorted(keys, objects) + (objects > 0)


def _colors(canvas: _Canvas, objects: Array, image: Array) -> _Colors:
    """Per object the median color of its inner pixels, or of all its pixels if it has no inner ones."""
    inner = _inner(objects)
    has_inner = np.zeros(len(image) + 1, bool)
    has_inner[objects[inner]] = True
    sampled = (objects > 0) & (inner | ~has_inner[objects])
    batch, rows, columns = np.nonzero(sampled)
    offset = _grouped_quantile(objects[sampled] - 1, canvas.offset[batch, :, rows, columns], 0.5)
    index, delta_e = nearest_color(offset + canvas.background[image])
    return _Colors(offset, index, delta_e)


def _grouped_quantile(group: Array, values: Array, q: float) -> Array:
    """The ``q`` quantile (M, C), rounded down to a value, of ``values`` (N, C) in each of M non-empty groups (N,)."""
    count = np.bincount(group)
    rank = np.cumsum(count) - count + (q * (count - 1)).astype(int)
    return np.stack([column[np.lexsort((column, group))][rank] for column in values.T], 1)


def _coverage(canvas: _Canvas, objects: Array, image: Array, color: Array) -> Array:
    """Estimate how much of each pixel each object covers, (M, SIZE, SIZE).

    It is the projection of the pixel's color on the line from the background to the object's color, near the object and
    not on another object.
    """
    planes = objects[image]
    region = near = planes == np.arange(1, len(image) + 1)[:, None, None]
    for _ in range(HALO):
        near = np.logical_or.reduce([near, *_neighbors(near)])
    near &= region | (planes == 0)
    direction = color / np.maximum((color**2).sum(1), 1.0)[:, None]
    number, rows, columns = np.nonzero(near)
    out = np.zeros(planes.shape, np.float32)
    offset = canvas.offset[image[number], :, rows, columns]
    projection = (offset * direction[number]).sum(1)
    own = region[number, rows, columns]
    peak = np.maximum(_grouped_quantile(number[own], projection[own, None], PEAK)[:, 0], 1.0)
    out[number, rows, columns] = np.clip(projection / peak[number], 0, 1)
    return out
