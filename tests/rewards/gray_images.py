"""Gray images, prompts for them, and scores that can be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from genalign.types import Prompt


def grays(*levels: float) -> Tensor:
    """Build one image (3, 4, 4) of each level in [0, 1]."""
    return torch.tensor(levels, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def named(count: int) -> list[Prompt]:
    """Build prompts that hold their number."""
    return [Prompt(f"gray {index}", {"tag": "single_object", "index": index}) for index in range(count)]


def plain(scores: Tensor) -> list[float]:
    """Return scores rounded to three digits, and NaN as -1, so that lists can be compared."""
    return [-1.0 if score != score else round(score, 3) for score in scores.tolist()]
