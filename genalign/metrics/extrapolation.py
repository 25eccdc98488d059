"""Distances of sets at infinite size, from those of smaller sets: FAD-infinity, and the same of any distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extrapolation:
    """``value`` + ``slope`` / n, fitted by least squares to the ``distances`` of sets of the ``sizes`` n; ``r_squared``
    of the fit."""

    value: float
    slope: float
    r_squared: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def at_infinite_size(
    distance: Callable[[Tensor], float], features: Tensor, smallest: int = 500, points: int = 25, seed: int = 0
) -> Extrapolation:
    """``distance`` of features (n, d) to a reference, freed of its bias of about 1 / n (arXiv 1911.07023, 2311.01616).

    Takes ``points`` sizes evenly from ``smallest`` to n, and of each a random part of the set, without replacement, as
    FID-infinity does. (Parts with replacement, which fadtk takes, are of an endless population with the covariance of
    this very set: their limit keeps its bias.) The distance of the reference set from the truth remains: take a large
    one.

    Raises:
        ValueError: fewer than 2 points, or a ``smallest`` size that is below 2 or not below n.
    """
    if points < 2 or not 2 <= smallest < len(features):
        raise ValueError(
            f"extrapolation needs 2 sizes or more between smallest and {len(features)} features, not {points} from"
            f" {smallest}: lower smallest, or take more samples"
        )
    sizes = torch.linspace(smallest, len(features), points).round().long().tolist()
    generator = torch.Generator().manual_seed(seed)
    parts = [features[torch.randperm(len(features), generator=generator)[:size]] for size in sizes]
    return _fitted(sizes, [distance(part) for part in parts])


def _fitted(sizes: list[int], distances: list[float]) -> Extrapolation:
    x, y = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    value = y.mean() - slope * x.mean()
    unexplained, spread = (y - value - slope * x).square().sum(), (y - y.mean()).square().sum()
    r_squared = 1 - float(unexplained / spread) if float(spread) > 0 else 1.0
    return Extrapolation(float(value), float(slope), r_squared, tuple(sizes), tuple(distances))
