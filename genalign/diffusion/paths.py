"""Gaussian paths x = alpha x0 + sigma eps, and conversions between network predictions, clean latents and noise.

Every conversion is a weighted sum of two latents. The weights are computed in float64 and cast once, to the latent's
dtype: float64 stays float64, everything else is computed and returned in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from typing import Literal, final

import torch
from torch import Tensor

from genalign.types import NoiseLevel

_ON_PATH_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LatentWeights:
    """Weights of a sum of two latents, float64 of shape () or (B,)."""

    first: Tensor
    second: Tensor


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

    @final
    def x0(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the clean latent (B, ...) that ``prediction`` implies."""
        return _blend(self.conversion(level).x0, x, prediction, "x0")

    @final
    def eps(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the noise (B, ...) that ``prediction`` implies."""
        return _blend(self.conversion(level).eps, x, prediction, "eps")

    @final
    def score(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the gradient of the log marginal at x, -eps / sigma (B, ...); sigma must be positive."""
        eps = self.conversion(level).eps
        return _blend(LatentWeights(-eps.first / level.sigma, -eps.second / level.sigma), x, prediction, "score")

    @final
    def prediction(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the network's training target (B, ...) for a clean latent and its noise."""
        return _blend(self.conversion(level).prediction, x0, eps, "prediction")

    @final
    def add_noise(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """Compute the noised latent x = alpha x0 + sigma eps (B, ...)."""
        return _blend(LatentWeights(level.alpha, level.sigma), x0, eps, "x")


@final
@dataclass(frozen=True)
class FlowPath(GaussianPath):
    """Rectified flow: alpha = 1 - sigma, prediction v = eps - x0 (arXiv 2209.03003; the sign of diffusers and SD3)."""

    def conversion(self, level: NoiseLevel) -> Conversion:
        _require_on_path(level.alpha + level.sigma - 1, "alpha = 1 - sigma")
        one = torch.ones_like(level.sigma)
        return Conversion(
            x0=LatentWeights(one, -level.sigma),
            eps=LatentWeights(one, level.alpha),
            prediction=LatentWeights(-one, one),
        )


@final
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
            x0, eps, prediction = (1 / alpha, -sigma / alpha), (zero, one), (zero, one)
        elif self.prediction_type == "sample":
            x0, eps, prediction = (zero, one), (1 / sigma, -alpha / sigma), (one, zero)
        else:
            x0, eps, prediction = (alpha, -sigma), (sigma, alpha), (-sigma, alpha)
        return Conversion(LatentWeights(*x0), LatentWeights(*eps), LatentWeights(*prediction))


@final
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
            x0=LatentWeights(data * data / variance, -slope * sigma),
            eps=LatentWeights(sigma / variance, slope),
            prediction=LatentWeights(-slope * sigma / (data * data), slope),
        )


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape a float64 coefficient, () or (B,), to multiply a latent x (B, ...), on its device.

    The result is float64 for a float64 latent and float32 for any other. Raises ValueError for another shape.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if coefficient.ndim == 0:
        return coefficient.to(dtype).to(x.device)
    if coefficient.shape != x.shape[:1]:
        raise ValueError(f"a coefficient must be () or ({len(x)},) for this latent, not {tuple(coefficient.shape)}")
    # The cast comes before the move: some devices have no float64.
    return coefficient.to(dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the tensors to the dtype of their arithmetic: float64 if one of them is float64, else float32."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _blend(weights: LatentWeights, first: Tensor, second: Tensor, name: str) -> Tensor:
    if first.shape != second.shape:
        raise ValueError(f"latents must have one shape, not {tuple(first.shape)} and {tuple(second.shape)}")
    if not bool((weights.first.isfinite() & weights.second.isfinite()).all()):
        raise ValueError(
            f"{name} is not determined by the prediction at this level, where alpha or sigma is 0: "
            "leave the level out, or use a network that predicts v"
        )
    first, second = promote(first, second)
    return expand(weights.first, first) * first + expand(weights.second, first) * second


def _require_on_path(residual: Tensor, equation: str) -> None:
    if not bool((residual.abs() <= _ON_PATH_TOLERANCE).all()):
        raise ValueError(f"this level is not on the path {equation}: take levels from the pipeline that owns the path")
