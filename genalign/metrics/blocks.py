"""Sets whose members are blocks of features, such as the frames of a clip, and what replacing a member changes."""

from __future__ import annotations

import torch
from torch import Tensor

from genalign.metrics.frechet import Gaussian, as_features


class BlockFrechetStatistic:
    """-Frechet distance of n blocks (n, f d) of f features each, all n f of them, to a fixed Gaussian of rank r, as
    blocks are replaced: in O(f d^2 + d^2 r + r^3) each, whatever n is.

    ValueError for blocks that are not whole features, or for a single feature in all.
    """

    def __init__(self, blocks: Tensor, reference: Gaussian) -> None:
        self._reference, self._width = reference, len(reference.mean)
        self._blocks = as_blocks(blocks, self._width) - reference.mean
        frames = self._blocks.flatten(0, 1)
        self._count, self._total, self._second = len(frames), frames.sum(0), frames.T @ frames
        self._reference_trace = float(reference.factor.square().sum())

    @property
    def value(self) -> float:
        return self._reward(self._total, self._second)

    @property
    def resolution(self) -> float:
        """What round-off makes of eigenvalues that are 0, beside that of the sums."""
        scale = float(self._second.trace()) / self._count + self._reference_trace
        return 1e-13 * scale + 2 * self._reference.factor.shape[1] * 1e-8 * scale

    def swapped(self, index: int, new: Tensor) -> float:
        return self._reward(*self._sums(index, self._block(new)))

    def swap(self, index: int, new: Tensor) -> None:
        self._total, self._second = self._sums(index, self._block(new))
        self._blocks[index] = self._block(new)

    def settle(self) -> None:
        """Nothing to do."""

    def _block(self, new: Tensor) -> Tensor:
        return new.view(-1, self._width) - self._reference.mean

    def _sums(self, index: int, block: Tensor) -> tuple[Tensor, Tensor]:
        old = self._blocks[index]
        return self._total + block.sum(0) - old.sum(0), self._second + block.T @ block - old.T @ old

    def _reward(self, total: Tensor, second: Tensor) -> float:
        mean = total / self._count
        covariance = (second - self._count * mean.outer(mean)) / (self._count - 1)
        shared = self._reference.factor.T @ covariance @ self._reference.factor
        overlap = torch.linalg.eigvalsh(shared).clamp(min=0).sqrt().sum()
        spread = covariance.trace() + self._reference_trace
        return float(2 * overlap - spread - mean.square().sum())


def as_blocks(blocks: Tensor, width: int) -> Tensor:
    """Rows (n, f d) as (n, f, d), float64, d = ``width``. ValueError where that does not divide them, or n f < 2."""
    rows = as_features(blocks, at_least=1)
    if rows.shape[1] % width:
        raise ValueError(f"rows of {rows.shape[1]} values are no whole number of features of width {width}")
    features = rows.view(len(rows), -1, width)
    if len(rows) * features.shape[1] < 2:
        raise ValueError("one clip of one frame has no covariance: score more clips, or longer ones")
    return features
