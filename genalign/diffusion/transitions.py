"""Sampling as Gaussian transitions, and the samplers as kernels.

Every sampler here moves to ``mean = alpha_next x0_hat + c eps_hat`` with ``std = s``; a kernel is the rule for (c, s).
Latents are (B, ...). The tensors of a step are () or (B,), so a batch can hold different steps.
Notation: D = sigma - sigma_next and q = (sigma_next / alpha_next) / (sigma / alpha).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.diffusion.paths import FlowPath, VPPath, expand
from genalign.types import Grid, NoiseStep, Path

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Transition:
    """The Gaussian p(x_next | x): ``mean`` (B, ...) and ``std``, () or (B,), which includes sqrt(D).

    ``std`` stays on the CPU, where it is checked without waiting for the device of ``mean``.

    Log-ratios and KL divergences are means over all dimensions but the first, the convention of public code for
    diffusion models: the true ones divided by the number of values per sample.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.std.ndim and self.std.shape != self.mean.shape[:1]:
            raise ValueError(f"std must be () or ({len(self.mean)},) for this mean, not {tuple(self.std.shape)}")

    def sample(self, noise: Tensor) -> Tensor:
        """Sample x_next = mean + std noise, for standard normal ``noise`` of the shape of ``mean``."""
        self._require_shape(noise)
        return self.mean + expand(self.std, self.mean) * noise

    def kl(self, other: Transition) -> Tensor:
        """Compute KL(self || other) = (mean - other.mean)^2 / (2 std^2), (B,), for transitions of equal std."""
        self._require_comparable(other)
        z = (self.mean - other.mean) / expand(self.std, self.mean)
        return (0.5 * z * z).flatten(1).mean(1)

    def log_ratio(self, old: Transition, x_next: Tensor) -> Tensor:
        """Compute log p(x_next | x) - log p_old(x_next | x), (B,), for transitions of equal std.

        The difference of squares is factored: the result is exactly 0 for equal means, and has full relative precision
        for nearly equal means.
        """
        self._require_shape(x_next)
        self._require_comparable(old)
        std = expand(self.std, self.mean)
        shift = (self.mean - old.mean) / std
        return (0.5 * shift * ((x_next - self.mean) + (x_next - old.mean)) / std).flatten(1).mean(1)

    def _require_shape(self, x_next: Tensor) -> None:
        if x_next.shape != self.mean.shape:
            raise ValueError(f"expected a tensor of shape {tuple(self.mean.shape)}, not {tuple(x_next.shape)}")

    def _require_comparable(self, other: Transition) -> None:
        self._require_shape(other.mean)
        if not bool((self.std > 0).all()):
            raise ValueError("a deterministic step (std = 0) has no density; train only stochastic steps")
        if bool((self.std != other.std).any()):
            raise ValueError("the two transitions have different std; compare the same kernel on the same step")


@dataclass(frozen=True)
class MoveScalars:
    """The weight ``c`` of eps_hat in the mean of a move, and its std ``s``; float64, () or (B,)."""

    c: Tensor
    s: Tensor


class Kernel(ABC):
    """A rule for (c, s), as a frozen dataclass of its parameters."""

    @abstractmethod
    def __call__(self, step: NoiseStep) -> MoveScalars:
        """Compute the scalars of a step, or of a batch of steps. Raises ValueError for a step it is not defined for."""

    def check(self, guidance: float, rewards: Sequence[str]) -> None:  # noqa: B027  # most kernels suit them all
        """Raise ValueError if the kernel was calibrated for another guidance scale or other rewards."""


@dataclass(frozen=True)
class ODE(Kernel):
    """The deterministic move along the predicted x0 and eps: Euler on a flow, DDIM with eta = 0 on any path."""

    def __call__(self, step: NoiseStep) -> MoveScalars:
        return MoveScalars(step.sigma_next, torch.zeros_like(step.sigma_next))


@dataclass(frozen=True)
class FlowSDE(Kernel):
    """Flow-GRPO (arXiv 2505.05470, eq. 9): noise of rate g = a sqrt(sigma / (1 - sigma)), a = ``noise_level``.

    At sigma = 1, where g is infinite, 1 - sigma is replaced by 1 - sigma_next, which makes std exactly a. The last step
    (sigma_next = 0) has std > 0. Each step leaves O(D^2) more noise than sigma_next, see ``leftover_noise``.

    Args:
        noise_level: Factor a of the noise rate, above 0.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if not self.noise_level > 0:
            raise ValueError(f"noise_level must be positive, not {self.noise_level}; a move without noise is ODE()")

    def __call__(self, step: NoiseStep) -> MoveScalars:
        alpha = torch.where(1 - step.sigma < _TOLERANCE, 1 - step.sigma_next, 1 - step.sigma)
        return _flow_move(step, self.noise_level * (step.sigma / alpha).sqrt())


@dataclass(frozen=True)
class DanceSDE(Kernel):
    """DanceGRPO (arXiv 2505.07818): FlowSDE with a constant noise rate g = ``eta``.

    Args:
        eta: Rate of the noise, above 0.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"eta must be positive, not {self.eta}; a move without noise is ODE()")

    def __call__(self, step: NoiseStep) -> MoveScalars:
        return _flow_move(step, torch.full_like(step.sigma, self.eta))


@dataclass(frozen=True)
class CalibratedSDE(Kernel):
    """DenseGRPO (arXiv 2601.20218, eq. 11): FlowSDE with a calibrated noise rate at each step.

    ``genalign.training.noise_calibration`` measures the rates.

    Attributes:
        levels: The noise rates (T,).
        sigmas: The noise levels (T + 1,) of the grid that they were measured on.
        guidance: The guidance scale that they were measured with.
        rewards: The names of the rewards that they were measured with.
    """

    levels: tuple[float, ...]
    sigmas: tuple[float, ...]
    guidance: float
    rewards: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.levels) + 1:
            raise ValueError(f"{len(self.levels)} levels need one more sigma, not {len(self.sigmas)}")

    def __call__(self, step: NoiseStep) -> MoveScalars:
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        on_grid = bool((step.index < len(self.levels)).all())
        if not on_grid or bool(((sigmas[step.index] - step.sigma).abs() > _TOLERANCE).any()):
            raise ValueError(
                f"the kernel was calibrated on the grid {list(self.sigmas)}, and sigma {step.sigma.tolist()} at step"
                f" {step.index.tolist()} is not on it: sample on that grid, or run genalign calibrate on this one"
            )
        return _flow_move(step, torch.tensor(self.levels, dtype=torch.float64)[step.index])

    def check(self, guidance: float, rewards: Sequence[str]) -> None:
        if guidance != self.guidance or set(rewards) != set(self.rewards):
            raise ValueError(
                f"the kernel was calibrated with guidance {self.guidance} and rewards {', '.join(self.rewards)}, not"
                f" with {guidance} and {', '.join(rewards)}: run genalign calibrate again"
            )


@dataclass(frozen=True)
class CPS(Kernel):
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): a fixed fraction of the noise is fresh.

    c = sigma_next cos(eta pi / 2) and s = sigma_next sin(eta pi / 2), so c^2 + s^2 = sigma_next^2. Samples are
    clean for any number of steps, but for a fixed eta > 0 their spread shrinks with more steps instead of converging to
    the marginals of the path: use it on few steps. The last step is deterministic.

    Args:
        eta: Fraction of fresh noise, in [0, 1]; 0 is the ODE.
    """

    eta: float = 0.8

    def __post_init__(self) -> None:
        _require_unit_interval(self.eta)

    def __call__(self, step: NoiseStep) -> MoveScalars:
        angle = self.eta * math.pi / 2
        return MoveScalars(step.sigma_next * math.cos(angle), step.sigma_next * math.sin(angle))


@dataclass(frozen=True)
class DPMSDE(Kernel):
    """First-order SDE-DPM-Solver++ (arXiv 2211.01095), on any path: c = sigma_next q, s = sigma_next sqrt(1 - q^2).

    It preserves the noise level like CPS, and converges to the marginals of the path. The last step is deterministic.
    """

    def __call__(self, step: NoiseStep) -> MoveScalars:
        return DDIM(eta=1.0)(step)


@dataclass(frozen=True)
class DDIM(Kernel):
    """DDIM (arXiv 2010.02502, eq. 16), on any path: s = eta sigma_next sqrt(1 - q^2), c = sqrt(sigma_next^2 - s^2).

    A step that stays at its noise level, as the last of a DDIMScheduler without set_alpha_to_one may, draws no noise.

    Args:
        eta: Stochasticity, in [0, 1]; 0 is deterministic DDIM, 1 is DDPM's ancestral sampling.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        _require_unit_interval(self.eta)

    def __call__(self, step: NoiseStep) -> MoveScalars:
        _require(step.sigma > 0, "sigma > 0: there is no noise left to remove")
        _require(step.alpha_next > 0, "alpha_next > 0")
        q = step.sigma_next * step.alpha / (step.sigma * step.alpha_next)
        _require((q >= 0) & (q <= 1), "a noise level that falls or stays")
        # Neither form subtracts near-equal numbers: sigma_next^2 - s^2 would, for q near 0.
        keep = ((1 - self.eta) * (1 + self.eta) + self.eta**2 * q * q).sqrt()
        return MoveScalars(step.sigma_next * keep, self.eta * step.sigma_next * ((1 - q) * (1 + q)).sqrt())


def default_kernel(path: Path) -> Kernel:
    """Return the published stochastic sampler of a path: Flow-GRPO's on a flow, DDIM's on a variance-preserving one.

    On any other path it is ``DPMSDE``.
    """
    if isinstance(path, FlowPath):
        return FlowSDE()
    return DDIM() if isinstance(path, VPPath) else DPMSDE()


def transition(path: Path, kernel: Kernel, x: Tensor, prediction: Tensor, step: NoiseStep) -> Transition:
    """Compute the Gaussian move from x, differentiable in ``x`` and ``prediction``.

    It is float64 for a float64 ``x`` and float32 for any other. A sample's move does not depend on the other samples of
    the batch.

    Args:
        path: The path that the network was trained on.
        kernel: The rule for the two scalars (c, s) of the move.
        x: Latents (B, ...) at the noise level of the step.
        prediction: The network's output (B, ...) for them.
        step: The step of the grid, one for the batch or one per sample.
    """
    x0, eps = path.x0(x, prediction, step), path.eps(x, prediction, step)
    scalars = kernel(step)
    mean = expand(step.alpha_next, x0) * x0 + expand(scalars.c, x0) * eps
    return Transition(mean, scalars.s)


def leftover_noise(kernel: Kernel, grid: Grid) -> Tensor:
    """Compute the noise in x_next relative to its nominal level, sqrt(c^2 + s^2) / sigma_next, (T,) float64.

    It is 1 at steps where the kernel preserves the noise level, and infinite if it leaves noise at sigma_next = 0.
    """
    step = grid[torch.arange(len(grid))]
    scalars = kernel(step)
    content = torch.hypot(scalars.c, scalars.s)
    return torch.where(content == step.sigma_next, 1.0, content / step.sigma_next)


def trainable_steps(kernel: Kernel, grid: Grid, limit: float = 3.0) -> tuple[int, ...]:
    """Return the steps that can be trained: stochastic, not the last, with leftover noise of at most ``limit``."""
    scalars = kernel(grid[torch.arange(len(grid))])
    usable = (scalars.s > 0) & (leftover_noise(kernel, grid) <= limit)
    return tuple(index for index, use in enumerate(usable[:-1].tolist()) if use)


def _flow_move(step: NoiseStep, rate: Tensor) -> MoveScalars:
    """Compute c = sigma_next - g^2 D / (2 sigma) and s = g sqrt(D) of a flow, for the noise rate g."""
    straight = (step.alpha + step.sigma - 1).abs() + (step.alpha_next + step.sigma_next - 1).abs() <= _TOLERANCE
    _require(straight, "a flow (alpha = 1 - sigma); on other paths use DDIM or DPMSDE")
    falls = (step.alpha >= 0) & (step.sigma > step.sigma_next) & (step.sigma_next >= 0)
    _require(falls, "a noise level that falls within [0, 1]")
    drop = step.sigma - step.sigma_next
    return MoveScalars(step.sigma_next - rate * rate * drop / (2 * step.sigma), rate * drop.sqrt())


def _require(condition: Tensor, need: str) -> None:
    if not bool(condition.all()):
        raise ValueError(f"the kernel is not defined for this step: it needs {need}")


def _require_unit_interval(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
