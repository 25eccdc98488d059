"""The diversity of images in what their prompts leave open: exact, from the verifier's own detections."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from genalign.evaluation.evaluate import load_evaluation
from genalign.runtime.media import inside, read_image
from genalign.types import Prompt
from genalign.worlds.shapes.detection import detect
from genalign.worlds.shapes.geometry import PALETTE, SIZE
from genalign.worlds.shapes.prompts import prompts as suite_prompts
from genalign.worlds.shapes.verifier import VERIFIER_VERSION

_CELLS = 3  # along each side
_COLORLESS_TASKS = frozenset({"single_object", "two_object", "counting", "position"})


@dataclass(frozen=True)
class Diversity:
    """Entropies as a share of the largest possible one: 0 where all objects are alike, 1 for a uniform distribution.

    ``color`` is over the objects whose color the prompt leaves open, ``cell`` over the cells of a 3 x 3 grid that hold
    the centers of objects whose position it leaves open. NaN where no such object was detected.
    """

    color: float
    cell: float


def diversity(images: Tensor, prompts: Sequence[Prompt]) -> Diversity:
    """Measure images (B, 3, 64, 64) in [0, 1] of these B prompts."""
    colors: list[str] = []
    cells: list[tuple[int, int]] = []
    for prompt, detections in zip(prompts, detect(images), strict=True):
        objects = [item for item in detections if item.shape != "unknown"]
        if prompt.task in _COLORLESS_TASKS:
            colors += [item.color for item in objects]
        if prompt.task != "position":
            centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in (item.box for item in objects)]
            cells += [(int(x * _CELLS // SIZE), int(y * _CELLS // SIZE)) for x, y in centers]
    return Diversity(_entropy(colors, len(PALETTE)), _entropy(cells, _CELLS**2))


def cell_entropy(images: Tensor, prompts: Sequence[Prompt]) -> float:
    """The ``cell`` of ``diversity``, as a diagnostic of the reward-hacking monitor."""
    return diversity(images, prompts).cell


def evaluation_diversity(folder: Path) -> dict[str, float]:
    """Measure the diversity of an evaluation's images; empty for another world, or if images were not saved."""
    evaluation = load_evaluation(folder)
    if evaluation.protocol.verifier != VERIFIER_VERSION or any(r.image is None for r in evaluation.records):
        return {}
    return asdict(diversity(*evaluation_images(folder)))


def evaluation_images(folder: Path) -> tuple[Tensor, list[Prompt]]:
    """Load an evaluation's saved images (N, 3, 64, 64) in [0, 1], and their prompts of the shapes world."""
    evaluation = load_evaluation(folder)
    by_text = {prompt.text: prompt for prompt in suite_prompts(evaluation.protocol.suite).prompts}
    images = torch.stack([read_image(inside(folder, str(record.image))) for record in evaluation.records])
    return images, [by_text[record.prompt] for record in evaluation.records]


def _entropy(values: Iterable[Hashable], kinds: int) -> float:
    counts = Counter(values)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values()) / math.log(kinds) if total else math.nan
