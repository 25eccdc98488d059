"""How varied images are in what their prompts leave open: exact, from the verifier's own detections."""

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
from genalign.worlds.shapes.detection import Detection, detect
from genalign.worlds.shapes.geometry import PALETTE, SIZE
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.verifier import VERIFIER_VERSION

_CELLS = 3  # along each side
_COLORLESS_TASKS = frozenset({"single_object", "two_object", "counting", "position"})


@dataclass(frozen=True)
class Diversity:
    """Entropies in units of the largest possible one, 0 where everything is the same and 1 where all are as frequent:
    of the colour where the prompt names none, and of the cell of a 3 x 3 grid that an object's middle is in where the
    prompt names no position. NaN where no such object was seen."""

    color: float
    cell: float


def diversity(images: Tensor, asked: Sequence[Prompt]) -> Diversity:
    """Of images (B, 3, 64, 64) in [0, 1], by what is left open by their prompts."""
    colors: list[str] = []
    cells: list[tuple[int, int]] = []
    for prompt, found in zip(asked, detect(images), strict=True):
        known = [item for item in found if item.shape != "unknown"]
        colors += [item.color for item in known if prompt.task in _COLORLESS_TASKS]
        cells += [_cell(item) for item in known if prompt.task != "position"]
    return Diversity(_entropy(colors, len(PALETTE)), _entropy(cells, _CELLS**2))


def color_entropy(images: Tensor, asked: Sequence[Prompt]) -> float:
    """That of ``diversity``, for ``hacking.shown``."""
    return diversity(images, asked).color


def cell_entropy(images: Tensor, asked: Sequence[Prompt]) -> float:
    """The same of cells."""
    return diversity(images, asked).cell


def evaluation_diversity(folder: Path) -> dict[str, float]:
    """The same of an evaluation's images; empty where they are not of the shapes world, or were not kept."""
    made = load_evaluation(folder)
    if made.protocol.verifier != VERIFIER_VERSION or any(record.image is None for record in made.records):
        return {}
    return asdict(diversity(*evaluation_images(folder)))


def evaluation_images(folder: Path) -> tuple[Tensor, list[Prompt]]:
    """An evaluation's kept images (N, 3, 64, 64) in [0, 1], and their prompts of the shapes world."""
    made = load_evaluation(folder)
    known = {prompt.text: prompt for prompt in prompts(made.protocol.suite).prompts}
    images = torch.stack([read_image(inside(folder, str(record.image))) for record in made.records])
    return images, [known[record.prompt] for record in made.records]


def _cell(item: Detection) -> tuple[int, int]:
    x1, y1, x2, y2 = item.box
    return int((x1 + x2) / 2 * _CELLS // SIZE), int((y1 + y2) / 2 * _CELLS // SIZE)


def _entropy(values: Iterable[Hashable], kinds: int) -> float:
    counts = Counter(values)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values()) / math.log(kinds) if total else math.nan
