"""Distances between sets of features, the diversity of one, and the same as members are replaced one by one.

A set is n features (n, d). Arithmetic is in float64 on the CPU wherever the features are, and without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
"""A positive definite kernel: from (n, d) and (m, d) to (n, m)."""

_SPURIOUS = 1e-12  # an eigenvalue below this share of the trace is round-off
_ROUND_OFF = 1e-15


def as_features(features: Tensor, at_least: int) -> Tensor:
    """``features`` (n, d) in float64 on the CPU. ValueError for fewer than ``at_least``, and for what is not finite."""
    if features.ndim != 2 or features.shape[1] < 1:
        raise ValueError(f"features must be (n, d), not {tuple(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"needs at least {at_least} samples, got {len(features)}: score a larger set")
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite: leave failed samples out of the set")
    return features.detach().cpu().double()


@dataclass(frozen=True)
class Gaussian:
    """The statistics of a set: ``mean`` (d,), and ``factor`` (d, r) of its covariance, factor factor^T; float64."""

    mean: Tensor
    factor: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.factor.ndim != 2 or len(self.factor) != len(self.mean):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.factor.shape)}"
            raise ValueError(f"mean must be (d,) and factor (d, r), not {shapes}")

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Of a set (n, d), with the unbiased covariance; r = min(n, d). ValueError for n < 2."""
        values = as_features(features, at_least=2)
        mean = values.mean(0)
        rows = (values - mean) / math.sqrt(len(values) - 1)
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R
        return cls(mean, rows.T)

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """From a mean (d,) and a covariance (d, d). ValueError where that is not symmetric positive semi-definite."""
        mean, covariance = mean.detach().cpu().double(), covariance.detach().cpu().double()
        if covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"covariance must be (d, d) for d = {len(mean)}, not {tuple(covariance.shape)}")
        if not bool(covariance.isfinite().all() & mean.isfinite().all()):
            raise ValueError("mean and covariance must be finite")
        tolerance = 1e-6 * float(covariance.abs().max())
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        if float((covariance - covariance.T).abs().max()) > tolerance or float(values[0]) < -tolerance:
            raise ValueError("covariance must be symmetric and have no negative eigenvalue")
        return cls(mean, vectors * values.clamp(min=0).sqrt())

    @property
    def covariance(self) -> Tensor:
        """(d, d)."""
        return self.factor @ self.factor.T


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The Frechet distance (squared; FID, FAD) of the Gaussians of x (n, d) and y (m, d); see ``gaussian_distance``.

    It is biased upwards by about 1 / n: compare sets of equal size only. ValueError for n or m below 2.
    """
    return gaussian_distance(Gaussian.of(x), Gaussian.of(y))


def gaussian_distance(x: Gaussian, y: Gaussian) -> float:
    """|mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2) (Dowson and Landau, 1982).

    With S = A A^T the last trace is the sum of the singular values of A_x^T A_y, exact for covariances of any rank.
    """
    _require_same_width(x.mean, y.mean)
    overlap = torch.linalg.svdvals(x.factor.T @ y.factor).sum()
    spread = x.factor.square().sum() + y.factor.square().sum()
    return max(0.0, float((x.mean - y.mean).square().sum() + spread - 2 * overlap))


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / d + 1)^3, the kernel of KID (arXiv 1801.01401, section 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class GaussianKernel:
    """exp(-|x - y|^2 / (2 bandwidth^2))."""

    bandwidth: float

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, not {self.bandwidth}")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        return torch.exp(-squares.clamp(min=0) / (2 * self.bandwidth**2))

    @classmethod
    def at_median(cls, reference: Tensor) -> GaussianKernel:
        """Bandwidth = the median distance of two members of the reference set (m, d) (KAD, arXiv 2502.15602)."""
        distances = torch.pdist(as_features(reference, at_least=2))
        median = float(distances.quantile(0.5) if len(distances) < 2**24 else distances.median())
        if median == 0:
            raise ValueError("most of the reference set is the same sample over again: give different ones")
        return cls(median)


def mmd(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of x (n, d) and y (m, d); it may be negative.

    mean of k(x_i, x_j), i != j, + the same of y - 2 mean of k(x_i, y_j) (Gretton et al., 2012, eq. 3). ValueError for n
    or m below 2.
    """
    return MMDStatistic(x, MMDReference.of(y, kernel)).distance


def kid(x: Tensor, y: Tensor) -> float:
    """The kernel inception distance of the whole sets, without subsets: ``mmd`` with ``polynomial_kernel``."""
    return mmd(x, y, polynomial_kernel)


def vendi(x: Tensor, order: float = 1.0) -> float:
    """The Vendi score of n features (n, d) with the cosine kernel, in [1, n] (arXiv 2210.02410; orders: 2310.12952).

    The exponential of the Renyi entropy of ``order`` >= 0, infinity included, of the eigenvalues of K / n. Falls when a
    set is smaller: compare sets of equal size only. ValueError for a feature of length 0, which has no direction.
    """
    if not order >= 0:
        raise ValueError(f"order must be 0 or more, not {order}")
    rows = _directions(x)
    values = torch.linalg.eigvalsh(_small_gram(rows))
    return math.exp(_renyi_entropy(values[values > _SPURIOUS], order))


def _directions(x: Tensor) -> Tensor:
    """Rows of length 1 / sqrt(n)."""
    values = as_features(x, at_least=1)
    norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    if bool((norm == 0).any()):
        raise ValueError("a feature of length 0 has no direction: leave such samples out of the set")
    directions: Tensor = values / norm / math.sqrt(len(values))
    return directions


def _renyi_entropy(p: Tensor, order: float) -> float:
    if order == math.inf:
        return -math.log(float(p.max()))
    if math.isclose(order, 1.0, rel_tol=1e-8):
        return float(torch.special.entr(p).sum())
    return math.log(float((p**order).sum())) / (1 - order)


def _small_gram(rows: Tensor) -> Tensor:
    """X^T X or X X^T, whichever is smaller: their eigenvalues other than 0 are the same."""
    return rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T


def _require_same_width(x: Tensor, y: Tensor) -> None:
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"the two sets have features of different width, {x.shape[-1]} and {y.shape[-1]}")


# Sets whose members are replaced one by one. Each statistic below is a ``genalign.demonstrations.SetStatistic``, and
# takes single features as that does.


@dataclass(frozen=True)
class MMDReference:
    """A reference set (m, d) with its kernel and the mean ``within`` of k(y_i, y_j), i != j."""

    features: Tensor
    kernel: Kernel
    within: float

    @classmethod
    def of(cls, features: Tensor, kernel: Kernel) -> MMDReference:
        """ValueError for m < 2. Takes memory for an (m, m) matrix."""
        values = as_features(features, at_least=2)
        return cls(values, kernel, float(_off_diagonal_sum(kernel(values, values))) / (len(values) * (len(values) - 1)))


def _off_diagonal_sum(matrix: Tensor) -> Tensor:
    return matrix.sum() - matrix.diagonal().sum()


class MMDStatistic:
    """-MMD^2 of n features (n, d) to a reference set, in O((n + m) d) per replacement."""

    def __init__(self, features: Tensor, reference: MMDReference) -> None:
        self._rows, self._reference = as_features(features, at_least=2).clone(), reference
        _require_same_width(self._rows, reference.features)
        self._within = float(_off_diagonal_sum(reference.kernel(self._rows, self._rows)))
        self._across = float(reference.kernel(self._rows, reference.features).sum())

    @property
    def distance(self) -> float:
        return self._distance(self._within, self._across)

    @property
    def value(self) -> float:
        return -self.distance

    @property
    def resolution(self) -> float:
        return 1e-12 * (abs(self._within) / len(self._rows) ** 2 + abs(self._reference.within))

    def swapped(self, index: int, new: Tensor) -> float:
        return -self._distance(*self._sums(index, new))

    def swap(self, index: int, new: Tensor) -> None:
        self._within, self._across = self._sums(index, new)
        self._rows[index] = new

    def settle(self) -> None:
        """Nothing to do."""

    def _sums(self, index: int, new: Tensor) -> tuple[float, float]:
        """The sums of k(x_i, x_j), i != j, and of k(x_i, y_j) after the replacement."""
        pair = torch.stack([new, self._rows[index]])
        within = self._reference.kernel(pair, self._rows)
        within[:, index] = 0
        across = self._reference.kernel(pair, self._reference.features)
        return (
            self._within + 2 * float(within[0].sum() - within[1].sum()),
            self._across + float(across[0].sum() - across[1].sum()),
        )

    def _distance(self, within: float, across: float) -> float:
        n, m = len(self._rows), len(self._reference.features)
        return within / (n * (n - 1)) + self._reference.within - 2 * across / (n * m)


class FrechetStatistic:
    """-Frechet distance of n features (n, d) to a fixed Gaussian of rank r, in O(d r + k^2) per replacement tried,
    k = min(n, r), and O(k^3) now and then; see ``_Spectrum``."""

    def __init__(self, features: Tensor, reference: Gaussian) -> None:
        self._rows, self._reference = as_features(features, at_least=2) - reference.mean, reference
        self._mean = self._rows.mean(0)
        self._scatter = float((self._rows - self._mean).square().sum())
        self._reference_trace = float(reference.factor.square().sum())
        self._overlap = _Rows(self._project(self._rows), _SQUARE_ROOT, centred=True)

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
    O(k^3) now and then; see ``_Spectrum``."""

    def __init__(self, features: Tensor) -> None:
        rows = _directions(features)
        self._count = len(rows)
        self._entropy = _Rows(rows, _ENTROPY, centred=False)

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
        return _directions(new[None])[0] / math.sqrt(self._count)


@dataclass(frozen=True)
class _TraceFunction:
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


_SQUARE_ROOT = _TraceFunction(torch.sqrt, 0.5, 0.5 / math.pi, reach=(50.0, 18.0), fine=3e-7, coarse=1e-4)
_ENTROPY = _TraceFunction(torch.special.entr, 1.0, 1.0, reach=(25.0, 18.0), fine=1e-7, coarse=1e-7)


class _Rows:
    """The sum of f over the eigenvalues of X^T X for rows X (n, r), centred or not, as rows are replaced.

    A replacement adds u v^T to X, with v = new - old and u the (centred) unit vector of the row. That adds to X^T X,
    and with u and v exchanged to X X^T, a matrix of rank two.
    """

    def __init__(self, rows: Tensor, trace: _TraceFunction, centred: bool) -> None:
        self._rows = rows.clone()
        self._tall = len(rows) > rows.shape[1]
        self._share = 1 / len(rows) if centred else 0.0  # of every row in what is subtracted from each
        self._offset = self._share * rows.sum(0)
        self._spectrum = _Spectrum(_small_gram(rows - self._offset), trace)

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


class _Spectrum:
    """The sum of f over the eigenvalues of a symmetric G >= 0 (k, k), and after adding W [[0, 1], [1, c]] W^T to it.

    The integral of ``_TraceFunction`` is taken by the trapezoidal rule in log s. The integrand decays at both ends and
    is analytic in a strip of half-width pi, so that the rule's error falls as exp(-2 pi^2 / step). The ratio of
    determinants is that of a 2 x 2 matrix in the eigenbasis of G, O(k) per node. Changes that were added stay pending
    as part of such a small matrix, which costs some precision, and only a number of them makes a new eigenbasis worth
    its O(k^3).
    """

    _STEP, _PENDING, _THIN = 0.6, 16, 12.0
    value: float
    _pending: Tensor
    _log_ratio: Tensor

    def __init__(self, matrix: Tensor, trace: _TraceFunction) -> None:
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
