"""The Frechet distance and the diversity of a set of features whose members are replaced one by one.

Each is a ``genalign.metrics.set_metric.SetStatistic``, and takes single features as that does.
"""

from __future__ import annotations

import math

from torch import Tensor

from genalign.metrics.frechet import Gaussian, as_features, directions
from genalign.metrics.spectra import ENTROPY, SQUARE_ROOT, TraceOfRows


class FrechetStatistic:
    """-Frechet distance of n features (n, d) to a fixed Gaussian of rank r, in O(d r + k^2) per replacement tried,
    k = min(n, r), and O(k^3) now and then; see ``genalign.metrics.spectra``."""

    def __init__(self, features: Tensor, reference: Gaussian) -> None:
        self._rows, self._reference = as_features(features, at_least=2) - reference.mean, reference
        self._mean = self._rows.mean(0)
        self._scatter = float((self._rows - self._mean).square().sum())
        self._reference_trace = float(reference.factor.square().sum())
        self._overlap = TraceOfRows(self._project(self._rows), SQUARE_ROOT, centred=True)

    @property
    def value(self) -> float:
        return self._reward(self._mean, self._scatter, self._overlap.value)

    @property
    def resolution(self) -> float:
        return 2 * self._overlap.resolution + 1e-13 * (self._scatter + self._reference_trace)

    def swapped(self, index: int, new: Tensor) -> float:
        mean, scatter = self._moments(index, new - self._reference.mean)
        return self._reward(mean, scatter, self._overlap.swapped(index, self._project(new - self._reference.mean)))

    def swap(self, index: int, new: Tensor) -> None:
        row = new - self._reference.mean
        self._mean, self._scatter = self._moments(index, row)
        self._overlap.swap(index, self._project(row))
        self._rows[index] = row

    def settle(self) -> None:
        self._overlap.settle()

    def _project(self, rows: Tensor) -> Tensor:
        return rows @ self._reference.factor / math.sqrt(len(self._rows) - 1)

    def _moments(self, index: int, row: Tensor) -> tuple[Tensor, float]:
        old, n = self._rows[index], len(self._rows)
        gain = (row - self._mean).square().sum() - (old - self._mean).square().sum() - (row - old).square().sum() / n
        return self._mean + (row - old) / n, self._scatter + float(gain)

    def _reward(self, mean: Tensor, scatter: float, overlap: float) -> float:
        spread = scatter / (len(self._rows) - 1) + self._reference_trace
        return 2 * overlap - spread - float(mean.square().sum())


class VendiStatistic:
    """The Vendi score of order 1 of n features (n, d), in O(k d + k^2) per replacement tried, k = min(n, d), and
    O(k^3) now and then; see ``genalign.metrics.spectra``."""

    def __init__(self, features: Tensor) -> None:
        rows = directions(features)
        self._count = len(rows)
        self._entropy = TraceOfRows(rows, ENTROPY, centred=False)

    @property
    def value(self) -> float:
        return math.exp(self._entropy.value)

    @property
    def resolution(self) -> float:
        return self.value * self._entropy.resolution

    def swapped(self, index: int, new: Tensor) -> float:
        return math.exp(self._entropy.swapped(index, self._direction(new)))

    def swap(self, index: int, new: Tensor) -> None:
        self._entropy.swap(index, self._direction(new))

    def settle(self) -> None:
        self._entropy.settle()

    def _direction(self, new: Tensor) -> Tensor:
        return directions(new[None])[0] / math.sqrt(self._count)
