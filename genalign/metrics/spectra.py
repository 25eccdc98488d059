"""Sums of a function over the eigenvalues of a Gram matrix, as rows are replaced one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.metrics.frechet import small_gram

_ROUND_OFF = 1e-15


@dataclass(frozen=True)
class TraceFunction:
    """A function f of eigenvalues for which a change of a matrix G >= 0 changes the sum of f by

    coefficient * integral over s > 0 of s^(power - 1) log [det(G' + s) / det(G + s)] ds.

    Both follow by parts from integrals of the resolvent: x^(1/2) from x / (x + s) / (pi s^(1/2)), and x log x from
    1 / (1 + s) - 1 / (x + s). The second holds as long as the trace of G does not change. ``reach``: how far the rule
    goes below and above log(largest eigenvalue). ``fine`` and ``coarse``: errors seen at worst, for sets with repeated
    members, without and with pending changes, in units of (largest eigenvalue)^power.
    """

    function: Callable[[Tensor], Tensor]
    power: float
    coefficient: float
    reach: tuple[float, float]
    fine: float
    coarse: float

    def tail(self, s: float, step: float) -> float:
        """The rule's terms beyond s for a change of unit trace, where the logarithm is 1 / s."""
        falls = math.exp(-step * (1 - self.power))
        return self.coefficient * step * s ** (self.power - 1) * falls / (1 - falls) if self.power < 1 else 0.0


SQUARE_ROOT = TraceFunction(torch.sqrt, 0.5, 0.5 / math.pi, reach=(50.0, 18.0), fine=3e-7, coarse=1e-4)
ENTROPY = TraceFunction(torch.special.entr, 1.0, 1.0, reach=(25.0, 18.0), fine=1e-7, coarse=1e-7)


class TraceOfRows:
    """The sum of f over the eigenvalues of X^T X for rows X (n, r), centred or not, as rows are replaced.

    A replacement adds u v^T to X, with v = new - old and u the (centred) unit vector of the row. That adds to X^T X,
    and with u and v exchanged to X X^T, a matrix of rank two.
    """

    def __init__(self, rows: Tensor, trace: TraceFunction, centred: bool) -> None:
        self._rows = rows.clone()
        self._tall = len(rows) > rows.shape[1]
        self._share = 1 / len(rows) if centred else 0.0  # of every row in what is subtracted from each
        self._offset = self._share * rows.sum(0)
        self._spectrum = Spectrum(small_gram(rows - self._offset), trace)

    @property
    def value(self) -> float:
        return self._spectrum.value

    @property
    def resolution(self) -> float:
        return self._spectrum.resolution

    def settle(self) -> None:
        self._spectrum.settle()

    def swapped(self, index: int, new: Tensor) -> float:
        return self._spectrum.value_after(*self._update(index, new))

    def swap(self, index: int, new: Tensor) -> None:
        self._spectrum.add(*self._update(index, new))
        self._offset = self._offset + self._share * (new - self._rows[index])
        self._rows[index] = new

    def _update(self, index: int, new: Tensor) -> tuple[Tensor, float]:
        """W (k, 2) and c of the change W [[0, 1], [1, c]] W^T of the smaller Gram matrix."""
        v = new - self._rows[index]
        if self._tall:
            return torch.stack([self._rows[index] - self._offset, v], 1), 1 - self._share
        u = torch.full((len(self._rows),), -self._share, dtype=v.dtype)
        u[index] += 1
        along = self._rows @ v
        return torch.stack([along - self._share * along.sum(), u], 1), float(v @ v)


class Spectrum:
    """The sum of f over the eigenvalues of a symmetric G >= 0 (k, k), and after adding W [[0, 1], [1, c]] W^T to it.

    The integral of ``TraceFunction`` is taken by the trapezoidal rule in log s. The integrand decays at both ends and
    is analytic in a strip of half-width pi, so that the rule's error falls as exp(-2 pi^2 / step). The ratio of
    determinants is that of a 2 x 2 matrix in the eigenbasis of G, O(k) per node. Changes that were added stay pending
    as part of such a small matrix, which costs some precision, and only a number of them makes a new eigenbasis worth
    its O(k^3).
    """

    _STEP, _PENDING, _THIN = 0.6, 16, 12.0
    value: float
    _pending: Tensor
    _log_ratio: Tensor

    def __init__(self, matrix: Tensor, trace: TraceFunction) -> None:
        self._matrix, self._trace = matrix, trace
        self._decompose()

    @property
    def resolution(self) -> float:
        """What ``value_after`` may be wrong by, less where nothing is pending."""
        precision = self._trace.coarse if self._pending.shape[1] else self._trace.fine
        return float(precision * self._scale**self._trace.power)

    def settle(self) -> None:
        """Leave nothing pending."""
        if self._pending.shape[1]:
            self._decompose()

    def value_after(self, w: Tensor, c: float) -> float:
        """The sum after adding W (k, 2), c to G, which is left as it is."""
        if self._outgrown(w, c):
            return self._sum(torch.linalg.eigvalsh(self._matrix + _rank_two(w, c)))
        return self.value + self._integral(self._bordered(self._basis.T @ w, c)) + self._tail * _trace(w, c)

    def add(self, w: Tensor, c: float) -> None:
        """Add W (k, 2), c to G."""
        self._matrix = self._matrix + _rank_two(w, c)
        if self._pending.shape[1] == 2 * min(self._PENDING, len(w) // 32) or self._outgrown(w, c):
            self._decompose()
            return
        w = self._basis.T @ w
        small = self._bordered(w, c)
        log_ratio = _log_abs_det(small)
        if float((log_ratio - self._log_ratio).abs().max()) > self._THIN:
            self._decompose()
            return
        self.value += self._integral(small) + self._tail * _trace(w, c)
        self._small, self._log_ratio = small, log_ratio
        self._pending = torch.cat([self._pending, w], 1)

    def _decompose(self) -> None:
        values, self._basis = torch.linalg.eigh(self._matrix)
        self._scale = max(float(values[-1]), 1e-300)
        s = (
            self._scale
            * torch.arange(-self._trace.reach[0], self._trace.reach[1], self._STEP, dtype=values.dtype).exp()
        )
        self._weight = self._trace.coefficient * self._STEP * s**self._trace.power
        self._tail = self._trace.tail(float(s[-1]), self._STEP)
        self._resolvent = 1 / (values.clamp(min=_ROUND_OFF * self._scale) + s[:, None])
        self._pending = values.new_zeros(len(values), 0)
        self._small, self._log_ratio = values.new_zeros(len(s), 0, 0), torch.zeros_like(s)
        self.value = self._sum(values)

    def _sum(self, values: Tensor) -> float:
        return float(self._trace.function(values.clamp(min=0)).sum())

    def _outgrown(self, w: Tensor, c: float) -> bool:
        """Whether the change leaves the range of s that was chosen for G."""
        return abs(_trace(w, c)) > 100 * self._scale

    def _bordered(self, w: Tensor, c: float) -> Tensor:
        """The small matrix (J, 2p + 2, 2p + 2), with W next to the p pending changes: C^-1 + W^T (G + s)^-1 W, whose
        determinant is +-det(G' + s) / det(G + s), as that of C is -1."""
        cross, own = self._products(self._pending, w), self._products(w, w) + w.new_tensor([[-c, 1.0], [1.0, 0.0]])
        return torch.cat([torch.cat([self._small, cross], 2), torch.cat([cross.mT, own], 2)], 1)

    def _products(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T (G + s)^-1 b, per node."""
        pairs = (a[:, :, None] * b[:, None, :]).flatten(1)
        products: Tensor = self._resolvent @ pairs
        return products.view(len(products), a.shape[1], b.shape[1])

    def _integral(self, small: Tensor) -> float:
        return float(self._weight @ (_log_abs_det(small) - self._log_ratio))


def _trace(w: Tensor, c: float) -> float:
    return float(2 * w[:, 0] @ w[:, 1] + c * w[:, 1] @ w[:, 1])


def _log_abs_det(matrix: Tensor) -> Tensor:
    found: Tensor = torch.linalg.slogdet(matrix).logabsdet
    return found.clamp(min=math.log(_ROUND_OFF))


def _rank_two(w: Tensor, c: float) -> Tensor:
    outer = torch.outer(w[:, 0], w[:, 1])
    return outer + outer.T + c * torch.outer(w[:, 1], w[:, 1])
