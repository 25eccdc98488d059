"""Gaussian paths x = alpha x0 + sigma eps, and conversions between network predictions, clean latents and noise.

Every conversion is a weighted sum of two latents. The weights are computed in float64 and cast once, to the latent's
dtype: float64 stays float64, everything else is computed and returned in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from genalign.types import NoiseLevel

_ON_PATH_TOLERANCE = 1e-5


LatentWeights = tuple[Tensor, Tensor]
"""Weights of a sum of two latents, float64 of shape () or (B,)."""


@dataclass(frozen=True)
class Conversion:
    """The weights at a level: x0 and eps as sums of (x, prediction), and the prediction as a sum of (x0, eps)."""

    x0: LatentWeights
    eps: LatentWeights
    prediction: LatentWeights


class GaussianPath(ABC):
    """The path x = alpha x0 + sigma eps of a network whose output is linear in (x0, eps).

    Latents are (B, ...) and the tensors of a level () or (B,).

    Raises:
        ValueError: In every method, if a level is not on the path, latents differ in shape, or the result is not
            determined at the level (a division by alpha = 0 or sigma = 0).
    """

    @abstractmethod
    def conversion(self, level: NoiseLevel) -> Conversion:
        """Return the weights at ``level``; they are not finite for a quantity that is not determined there."""

    def x0(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the clean latent (B, ...) that ``prediction`` implies."""
        return _blend(self.conversion(level).x0, x, prediction, "x0")

    def eps(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the noise (B, ...) that ``prediction`` implies."""
        return _blend(self.conversion(level).eps, x, prediction, "eps")

    def prediction(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the network's training target (B, ...) for a clean latent and its noise."""
        return _blend(self.conversion(level).prediction, x0, eps, "prediction")

    def add_noise(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the noised latent x = alpha x0 + sigma eps (B, ...)."""
        return _blend((level.alpha, level.sigma), x0, eps, "x")


@dataclass(frozen=True)
class FlowPath(GaussianPath):
    """Rectified flow: alpha = 1 - sigma, prediction v = eps - x0 (arXiv 2209.03003; the sign of diffusers and SD3)."""

    def conversion(self, level: NoiseLevel) -> Conversion:
        _require_on_path(level.alpha + level.sigma - 1, "alpha = 1 - sigma")
        one = torch.ones_like(level.sigma)
        return Conversion(x0=(one, -level.sigma), eps=(one, level.alpha), prediction=(-one, one))


@dataclass(frozen=True)
class VPPath(GaussianPath):
    """The variance-preserving path, alpha^2 + sigma^2 = 1 (arXiv 2006.11239; v: arXiv 2202.00512, appendix D)."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, not {self.prediction_type!r}")

    def conversion(self, level: NoiseLevel) -> Conversion:
        alpha, sigma = level.alpha, level.sigma
        _require_on_path(alpha * alpha + sigma * sigma - 1, "alpha^2 + sigma^2 = 1")
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        if self.prediction_type == "epsilon":
            return Conversion(x0=(1 / alpha, -sigma / alpha), eps=(zero, one), prediction=(zero, one))
        if self.prediction_type == "sample":
            return Conversion(x0=(zero, one), eps=(1 / sigma, -alpha / sigma), prediction=(one, zero))
        return Conversion(x0=(alpha, -sigma), eps=(sigma, alpha), prediction=(-sigma, alpha))


@dataclass(frozen=True)
class EDMPath(GaussianPath):
    """The variance-exploding path with preconditioning, alpha = 1 (arXiv 2206.00364, table 1).

    The prediction is the network's raw output F, x0 = c_skip x + c_out F with c_skip = sigma_data^2 / r^2,
    c_out = -+ sigma sigma_data / r and r^2 = sigma^2 + sigma_data^2; "v_prediction" has the minus, "epsilon" the plus.
    """

    sigma_data: float = 1.0
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, not {self.sigma_data}")
        if self.prediction_type not in ("v_prediction", "epsilon"):
            raise ValueError(f"prediction_type must be v_prediction or epsilon, not {self.prediction_type!r}")

    def conversion(self, level: NoiseLevel) -> Conversion:
        _require_on_path(level.alpha - 1, "alpha = 1")
        sigma, data = level.sigma, self.sigma_data
        sign = 1.0 if self.prediction_type == "v_prediction" else -1.0
        variance = sigma * sigma + data * data
        slope = sign * data / variance.sqrt()
        return Conversion(
            x0=(data * data / variance, -slope * sigma),
            eps=(sigma / variance, slope),
            prediction=(-slope * sigma / (data * data), slope),
        )


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Cast and reshape a float64 coefficient, () or (B,), to multiply a latent x (B, ...).

    The result is float64 for a float64 latent and float32 for any other. One coefficient of all rows stays on the CPU,
    since a kernel takes it as a number, without a copy; others are copied to the latent's device. Raises ValueError for
    another shape.
    """
    if coefficient.ndim and coefficient.shape != x.shape[:1]:
        raise ValueError(f"a coefficient must be () or ({len(x)},) for this latent, not {tuple(coefficient.shape)}")
    # The cast comes before the move: some devices have no float64
    cast = coefficient.to(torch.promote_types(x.dtype, torch.float32))
    return cast.to(x.device, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1)) if cast.ndim else cast


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the tensors to the dtype of their arithmetic: float64 if one of them is float64, else float32."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _blend(weights: LatentWeights, first: Tensor, second: Tensor, name: str) -> Tensor:
    if first.shape != second.shape:
        raise ValueError(f"latents must have one shape, not {tuple(first.shape)} and {tuple(second.shape)}")
    of_first, of_second = weights
    if not bool((of_first.isfinite() & of_second.isfinite()).all()):
        raise ValueError(
            f"{name} is not determined by the prediction at this level, where alpha or sigma is 0: "
            "leave the level out, or use a network that predicts v"
        )
    first, second = promote(first, second)
    return expand(of_first, first) * first + expand(of_second, first) * second


def _require_on_path(residual: Tensor, equation: str) -> None:
    if not bool((residual.abs() <= _ON_PATH_TOLERANCE).all()):
        raise ValueError(f"this level is not on the path {equation}: take levels from the pipeline that owns the path")
