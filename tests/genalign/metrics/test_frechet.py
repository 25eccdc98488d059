import math
from collections.abc import Callable

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from genalign.metrics.frechet import Gaussian, frechet_distance, gaussian_distance, vendi
from genalign.metrics.incremental import FrechetStatistic, VendiStatistic
from genalign.metrics.mmd import GaussianKernel, MMDReference, MMDStatistic, kid, mmd, polynomial_kernel
from genalign.metrics.set_metric import SetStatistic


def drawn(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1.0, 0.1, d, dtype=torch.float64)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing * spread * scale + shift


def kernel_features(kernel: Tensor) -> Tensor:
    """Features whose inner products are ``kernel``."""
    values, vectors = torch.linalg.eigh(kernel.double())
    return vectors * values.clamp(min=0).sqrt()


def test_frechet_distance_worked_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # mean (1, 0), covariance diag(2, 0)
    assert frechet_distance(x, torch.tensor([[0.0, 1.0], [0.0, 3.0]])) == pytest.approx(5 + 2 + 2, abs=1e-12)
    assert frechet_distance(x, torch.tensor([[0.0, 1.0], [4.0, 1.0]])) == pytest.approx(2 + 2 + 8 - 8, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 8), (200, 9, 8), (5, 300, 1)])
def test_frechet_distance_is_that_of_the_matrix_square_root(n: int, m: int, d: int) -> None:
    x, y = drawn(n, d, 0), drawn(m, d, 1, scale=2.0, shift=0.5)
    a, b = x.T.cov().reshape(d, d), y.T.cov().reshape(d, d)
    root = torch.from_numpy(sqrtm((a @ b).numpy()).real)
    expected = float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root.trace())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    by_statistics = gaussian_distance(
        Gaussian.from_covariance(x.mean(0), a), Gaussian.from_covariance(y.mean(0).float(), b)
    )
    assert by_statistics == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(50, 6), (6, 50), (2, 3)])
def test_a_set_is_at_no_distance_from_itself(n: int, d: int) -> None:
    x = drawn(n, d, 0, shift=3.0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 1) == pytest.approx(d, rel=1e-9)


def test_diagonal_gaussians() -> None:
    a, b = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 16.0, 25.0])
    mean = torch.zeros(3)
    distance = gaussian_distance(Gaussian.from_covariance(mean, a.diag()), Gaussian.from_covariance(mean + 1, b.diag()))
    assert distance == pytest.approx(3 + 1 + 1 + 25)


def test_a_rank_deficient_set_is_the_limit_of_full_rank_ones() -> None:
    x, y = drawn(5, 20, 0), drawn(60, 20, 1)
    mean, covariance = x.mean(0), x.T.cov()
    widened = Gaussian.from_covariance(mean, covariance + 1e-10 * torch.eye(20))
    assert frechet_distance(x, y) == pytest.approx(gaussian_distance(widened, Gaussian.of(y)), rel=1e-4)
    assert torch.allclose(Gaussian.of(x).covariance, covariance)
    assert torch.allclose(Gaussian.of(y).covariance, y.T.cov())


def test_features_keep_no_gradient_and_any_float() -> None:
    x = drawn(10, 3, 0).float().requires_grad_()
    assert frechet_distance(x.bfloat16(), x) < 1e-2
    assert not Gaussian.of(x).factor.requires_grad
    assert Gaussian.of(x).mean.dtype == torch.float64


@pytest.mark.parametrize("score", [frechet_distance, kid])
def test_sets_that_have_no_distance_are_refused(score: Callable[[Tensor, Tensor], float]) -> None:
    y = drawn(10, 3, 0)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        score(y[:1], y)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        score(y, y[:1])
    with pytest.raises(ValueError, match="must be finite"):
        score(torch.full((4, 3), math.nan), y)
    with pytest.raises(ValueError, match="different width"):
        score(y[:, :2], y)
    with pytest.raises(ValueError, match=r"must be \(n, d\)"):
        score(y[0], y)


def test_statistics_that_are_no_gaussian_are_refused() -> None:
    with pytest.raises(ValueError, match="no negative eigenvalue"):
        Gaussian.from_covariance(torch.zeros(2), torch.tensor([1.0, -1.0]).diag())
    with pytest.raises(ValueError, match="symmetric"):
        Gaussian.from_covariance(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"covariance must be \(d, d\)"):
        Gaussian.from_covariance(torch.zeros(3), torch.eye(2))
    with pytest.raises(ValueError, match="finite"):
        Gaussian.from_covariance(torch.zeros(1), torch.tensor([[math.inf]]))
    with pytest.raises(ValueError, match=r"factor \(d, r\)"):
        Gaussian(torch.zeros(3), torch.zeros(2, 2))


def test_kid_worked_by_hand() -> None:
    # k(1, 2) = 27, k(0, 0) = 1, k(., 0) = 1
    assert kid(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]])) == pytest.approx(27 + 1 - 2)


def test_mmd_is_the_mean_over_pairs() -> None:
    x, y, kernel = drawn(4, 3, 0), drawn(5, 3, 1), GaussianKernel(2.0)

    def mean(a: Tensor, b: Tensor, apart: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (apart and i == j)]
        return sum(math.exp(-float((a[i] - b[j]).square().sum()) / 8) for i, j in pairs) / len(pairs)

    assert mmd(x, y, kernel) == pytest.approx(mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))


def test_kid_has_no_bias() -> None:
    values = torch.tensor([kid(drawn(6, 4, 2 * i), drawn(9, 4, 2 * i + 1)) for i in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20
    assert float(values.min()) < 0


def test_median_bandwidth() -> None:
    assert GaussianKernel.at_median(torch.tensor([[0.0], [1.0], [3.0]])).bandwidth == 2.0
    with pytest.raises(ValueError, match="the same sample over again"):
        GaussianKernel.at_median(torch.zeros(3, 1))


def test_vendi_worked_numbers() -> None:
    block = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert vendi(kernel_features(block)) == pytest.approx(2.1573, abs=5e-5)
    p = torch.tensor([1.9, 0.1, 1.0]) / 3
    assert vendi(kernel_features(block), 2.0) == pytest.approx(1 / float(p.square().sum()))
    assert vendi(kernel_features(block), 0.5) == pytest.approx(float(p.sqrt().sum()) ** 2)
    assert vendi(kernel_features(block), math.inf) == pytest.approx(3 / 1.9)
    places = torch.tensor([0.0, 0.0, 10.0, 10.0, 20.0, 20.0])
    assert vendi(kernel_features((-(places[:, None] - places).abs()).exp())) == pytest.approx(3 - 4.1223e-9, abs=1e-12)


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 1.0 + 1e-9, 2.0, math.inf])
def test_vendi_counts_what_is_different(order: float) -> None:
    assert vendi(torch.ones(7, 3), order) == pytest.approx(1)
    assert vendi(3 * torch.eye(5), order) == pytest.approx(5)
    assert vendi(torch.eye(5).repeat(4, 1), order) == pytest.approx(5)


def test_vendi_of_more_samples_than_features() -> None:
    x = drawn(30, 4, 0)
    assert vendi(x) == pytest.approx(vendi(torch.cat([x, torch.zeros(30, 40)], 1)))
    scores = [vendi(x, order) for order in (0.0, 0.5, 1.0, 3.0, math.inf)]
    assert scores == sorted(scores, reverse=True)
    assert vendi(x, 1.0 + 1e-4) == pytest.approx(vendi(x), rel=1e-3)


def test_what_has_no_vendi_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no direction"):
        vendi(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="order"):
        vendi(torch.eye(2), -1.0)
    with pytest.raises(ValueError, match="order"):
        vendi(torch.eye(2), math.nan)


def frechet_to(reference: Tensor) -> tuple[Callable[[Tensor], SetStatistic], Callable[[Tensor], float]]:
    gaussian = Gaussian.of(reference)
    return lambda x: FrechetStatistic(x, gaussian), lambda x: -gaussian_distance(Gaussian.of(x), gaussian)


def kid_to(reference: Tensor) -> tuple[Callable[[Tensor], SetStatistic], Callable[[Tensor], float]]:
    prepared = MMDReference.of(reference, polynomial_kernel)
    return lambda x: MMDStatistic(x, prepared), lambda x: -kid(x, reference)


def vendi_of(reference: Tensor) -> tuple[Callable[[Tensor], SetStatistic], Callable[[Tensor], float]]:
    return VendiStatistic, vendi


@pytest.mark.parametrize("kind", [frechet_to, kid_to, vendi_of])
@pytest.mark.parametrize(
    ("n", "d", "m"), [(200, 8, 100), (40, 96, 300), (64, 64, 20), (80, 64, 300), (2, 6, 9), (70, 1, 9)]
)
@pytest.mark.parametrize("data", ["usual", "repeated", "collapsed", "shrinking"])
def test_a_changing_set_scores_as_a_new_one(
    kind: Callable[[Tensor], tuple[Callable[[Tensor], SetStatistic], Callable[[Tensor], float]]],
    n: int,
    d: int,
    m: int,
    data: str,
) -> None:
    """Differences are right to the stated resolution, or to 1e-7 of themselves where they dwarf the set."""
    make, score = kind(drawn(m, d, 0))
    x, new = drawn(n, d, 1, shift=0.3), drawn(18, d, 2, shift=0.2)
    if data == "repeated":
        x[n // 2 :], new[9:] = x[: n - n // 2].clone(), x[0]
    if data == "collapsed":
        x[:] = x[0]
    if data == "shrinking":
        new = new * 1e-3
    statistic = make(x)
    assert statistic.value == pytest.approx(score(x), rel=1e-6)
    before = score(x)
    for step, row in enumerate(new):
        index = 7 * step % n
        if step % 6 == 5:
            statistic.settle()
        predicted, resolution = statistic.swapped(index, row) - statistic.value, statistic.resolution
        x[index] = row
        after = score(x)
        assert predicted == pytest.approx(
            after - before, abs=resolution + 1e-12 * abs(after) + 1e-7 * abs(after - before)
        )
        assert resolution < 1e-2 * abs(after) + 1e-6
        statistic.swap(index, row)
        before = after
    statistic.settle()
    assert statistic.value == pytest.approx(score(x), rel=1e-6, abs=1e-6)


def test_trying_a_change_changes_nothing() -> None:
    x, row = drawn(20, 30, 1), drawn(1, 30, 2)[0]
    for statistic in (frechet_to(drawn(50, 30, 0))[0](x), VendiStatistic(x), kid_to(drawn(50, 30, 0))[0](x)):
        value = statistic.value
        first = statistic.swapped(3, row)
        statistic.swapped(4, 5 * row)
        assert statistic.value == value
        assert statistic.swapped(3, row) == first
        statistic.swap(3, row)
        assert statistic.value == pytest.approx(first)
    assert torch.equal(x, drawn(20, 30, 1))
