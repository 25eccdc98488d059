import math

import pytest
import torch
from torch import Tensor

from genalign.diffusion.paths import EDMPath, FlowPath, GaussianPath, VPPath, expand, promote
from genalign.types import NoiseLevel


def level(alpha: Tensor | list[float] | float, sigma: Tensor | list[float] | float) -> NoiseLevel:
    alpha, sigma = (torch.as_tensor(value, dtype=torch.float64) for value in (alpha, sigma))
    return NoiseLevel(timestep=sigma, alpha=alpha, sigma=sigma)


def full(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


SIGMA = torch.tensor([0.03, 0.4, 0.8, 0.97], dtype=torch.float64)
FLOW, VP = level(1 - SIGMA, SIGMA), level((1 - SIGMA**2).sqrt(), SIGMA)
EDM = level(torch.ones(4), [0.05, 0.3, 2.0, 80.0])
PATHS = [
    pytest.param(FlowPath(), FLOW, id="flow"),
    pytest.param(VPPath("epsilon"), VP, id="vp-epsilon"),
    pytest.param(VPPath("v_prediction"), VP, id="vp-v"),
    pytest.param(VPPath("sample"), VP, id="vp-sample"),
    pytest.param(EDMPath(0.5), EDM, id="edm-v"),
    pytest.param(EDMPath(1.0, "epsilon"), EDM, id="edm-epsilon"),
]


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    eps = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    return x0.to(dtype), eps.to(dtype)


@pytest.mark.parametrize(("path", "at"), PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_a_training_target_gives_its_pair_back(
    path: GaussianPath, at: NoiseLevel, dtype: torch.dtype, tolerance: float
) -> None:
    x0, eps = pair(dtype)
    x, prediction = path.add_noise(x0, eps, at), path.prediction(x0, eps, at)
    torch.testing.assert_close(x, expand(at.alpha, x) * x0 + expand(at.sigma, x) * eps)
    torch.testing.assert_close(path.x0(x, prediction, at), x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(path.eps(x, prediction, at), eps, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted_before_any_arithmetic(dtype: torch.dtype) -> None:
    x, output = pair(dtype)
    for at in (FLOW, level(0.2, 0.8)):
        half = FlowPath().x0(x, output, at)
        assert half.dtype == torch.float32
        assert torch.equal(half, FlowPath().x0(x.float(), output.float(), at))
    assert promote(x, output.double())[0].dtype == torch.float64


def test_a_mixed_batch_of_levels_is_bitwise_its_samples() -> None:
    x, output = pair(torch.float32)
    batch = FlowPath().eps(x, output, FLOW)
    for i, sigma in enumerate(SIGMA):
        assert torch.equal(batch[i : i + 1], FlowPath().eps(x[i : i + 1], output[i : i + 1], level(1 - sigma, sigma)))


@pytest.mark.parametrize(
    ("path", "at", "x0", "eps"),
    [
        (FlowPath(), level(0.2, 0.8), 0.74, 0.44),
        (VPPath("epsilon"), level(0.3**0.5, 0.7**0.5), 1.3711284987, -0.3),
        (VPPath("v_prediction"), level(0.3**0.5, 0.7**0.5), 0.5248592867, 0.2540132460),
        (EDMPath(), level(1.0, 2.0), 0.3683281573, 0.0658359214),
        (EDMPath(1.0, "epsilon"), level(1.0, 2.0), -0.1683281573, 0.3341640786),
    ],
)
def test_worked_numbers(path: GaussianPath, at: NoiseLevel, x0: float, eps: float) -> None:
    x, output = full(0.5), full(-0.3)
    assert (path.x0(x, output, at).item(), path.eps(x, output, at).item()) == pytest.approx((x0, eps), abs=1e-9)


def test_levels_where_the_flow_needs_no_division() -> None:
    x, v = pair()
    assert torch.equal(FlowPath().x0(x, v, level(1.0, 0.0)), x)
    assert torch.equal(FlowPath().eps(x, v, level(0.0, 1.0)), x)
    assert torch.equal(FlowPath().eps(x, v, level(1.0, 0.0)), x + v)
    assert torch.equal(VPPath("v_prediction").x0(x, v, level(0.0, 1.0)), -v)


def test_what_is_not_determined_is_an_error() -> None:
    x, output = pair()
    with pytest.raises(ValueError, match="eps is not determined"):
        VPPath("sample").eps(x, output, level(1.0, 0.0))
    with pytest.raises(ValueError, match="x0 is not determined"):
        VPPath("epsilon").x0(x, output, level(0.0, 1.0))
    torch.testing.assert_close(VPPath("epsilon").eps(x, output, level(0.0, 1.0)), output)


@pytest.mark.parametrize("path", [FlowPath(), VPPath(), EDMPath()])
@pytest.mark.parametrize("off", [(0.5, 0.6), (math.nan, 0.5)])
def test_a_level_of_another_path_is_refused(path: GaussianPath, off: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="not on the path"):
        path.x0(*pair(), level(*off))


def test_shapes_and_parameters_are_checked() -> None:
    x, output = pair()
    with pytest.raises(ValueError, match="one shape"):
        FlowPath().x0(x, output[:2], level(0.5, 0.5))
    with pytest.raises(ValueError, match="coefficient must be"):
        FlowPath().x0(x, output, level([0.5], [0.5]))
    with pytest.raises(ValueError, match="prediction_type"):
        VPPath("velocity")
    with pytest.raises(ValueError, match="prediction_type"):
        EDMPath(1.0, "sample")
    with pytest.raises(ValueError, match="sigma_data"):
        EDMPath(0.0)


def test_expand_casts_after_float64_arithmetic() -> None:
    coefficient = 1 - torch.tensor([1e-9, 0.1], dtype=torch.float64)
    single = expand(coefficient, torch.zeros(2, 3, 4))
    assert single.shape == (2, 1, 1)
    assert torch.equal(single.flatten(), coefficient.float())
    assert torch.equal(expand(coefficient, torch.zeros(2, 3).double()).flatten(), coefficient)
    assert expand(coefficient[0], torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
