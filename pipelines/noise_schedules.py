"""The noise schedules of networks whose scheduler lists noise levels: variance-preserving, and EDM with alpha = 1."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from genalign.diffusion.paths import EDMPath, GaussianPath, VPPath, expand
from genalign.types import Conditioning, Grid, NoiseLevel
from pipelines.base import DiffusersPipeline
from pipelines.steering.scheduler_hooks import grid_of

EDM_SCHEDULERS = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
_ON_TRAINING_LEVELS = (DDIMScheduler, DDPMScheduler, PNDMScheduler, LCMScheduler, TCDScheduler)
_MULTISTEP = (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, SASolverScheduler)


class NoiseSchedule(ABC):
    """The path, the sampling grid and the training levels of a network, by the scheduler of its checkpoint."""

    @property
    @abstractmethod
    def path(self) -> GaussianPath:
        """The interpolation that the network was trained on."""

    @property
    @abstractmethod
    def first_order(self) -> type[SchedulerMixin]:
        """The scheduler of diffusers whose grid this is."""

    @property
    @abstractmethod
    def first_std(self) -> float:
        """The standard deviation of the latents that sampling starts from."""

    @abstractmethod
    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the scheduler's grid, or the grid of explicit ``sigmas``."""

    @abstractmethod
    def level(self, u: Tensor) -> NoiseLevel:
        """Return noise levels for training at u in [0, 1] (B,)."""

    @abstractmethod
    def scale_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Scale latents (B, ...) to what the network takes."""


@dataclass(frozen=True)
class VPSchedule(NoiseSchedule):
    """The path alpha^2 + sigma^2 = 1 of a network that takes training timesteps.

    The grid is DDIM's where the checkpoint's scheduler steps on the training levels, its own where it is a multistep
    solver, and EulerDiscrete's for any other. Euler's moves are DDIM's in other coordinates: x / alpha, sigma / alpha.
    """

    scheduler: Any

    @property
    def path(self) -> VPPath:
        """The path, with the scheduler's prediction type."""
        return VPPath(self.scheduler.config.prediction_type)

    @property
    def first_order(self) -> type[SchedulerMixin]:
        """The class of the scheduler whose grid this is."""
        kind: type[SchedulerMixin] = EulerDiscreteScheduler
        if isinstance(self.scheduler, _ON_TRAINING_LEVELS):
            kind = DDIMScheduler
        elif isinstance(self.scheduler, _MULTISTEP):
            kind = type(self.scheduler)
        return kind

    @property
    def first_std(self) -> float:
        """The standard deviation 1, or that of only the noise if EulerDiscrete starts from it."""
        if self.first_order is not EulerDiscreteScheduler or self.scheduler.config.timestep_spacing == "leading":
            return 1.0
        first = self.grid(2)  # every grid but one of a single step begins at the last training level
        return float(first.sigma[0])

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the grid of the first-order scheduler. Raises ValueError for ``sigmas`` other than its own."""
        scheduler = self._converted(self.first_order)
        scheduler.set_timesteps(num_steps)
        grid = grid_of(scheduler)
        if sigmas is not None:
            own = grid.sigma[:-1].tolist()
            close = (math.isclose(a, b, abs_tol=1e-7) for a, b in zip(sigmas, own, strict=True))  # records are rounded
            if len(sigmas) != len(own) or not all(close):
                raise ValueError(
                    "the network of this family takes only integer timesteps, so noise levels cannot be set"
                    " freely: give sampling.num_steps without sampling.sigmas"
                )
        return grid

    def level(self, u: Tensor) -> NoiseLevel:
        """Return the noise level of the training timestep nearest to u in [0, 1] (B,)."""
        alphas_squared = self._converted(DDIMScheduler).alphas_cumprod.double()
        timestep = (u.double().cpu() * (len(alphas_squared) - 1)).round().long()
        alpha_squared = alphas_squared[timestep].to(u.device)
        return NoiseLevel(timestep.double().to(u.device), alpha_squared.sqrt(), (1 - alpha_squared).sqrt())

    def scale_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Return the latents as they are."""
        return x

    def _converted(self, kind: Any) -> Any:
        """Build a scheduler of another class with every setting that the checkpoint's reads.

        The ``from_config`` of diffusers would take its own defaults for settings that are at the checkpoint's.
        """
        read = inspect.signature(type(self.scheduler)).parameters
        return kind(**{key: self.scheduler.config[key] for key in inspect.signature(kind).parameters if key in read})


class EDMSchedule(NoiseSchedule):
    """The path alpha = 1 of a network that takes latents at unit variance, with the timestep log(sigma) / 4.

    Training levels are uniform in the timestep, from the scheduler's sigma_min (u = 0) to its sigma_max.
    """

    first_order: ClassVar[type[SchedulerMixin]] = EDMEulerScheduler

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    @property
    def path(self) -> EDMPath:
        """The path, with the scheduler's sigma_data and prediction type."""
        config = self.scheduler.config
        return EDMPath(config.sigma_data, config.prediction_type)

    @property
    def first_std(self) -> float:
        """The standard deviation of noise at sigma_max and clean latents together."""
        return float(self.scheduler.init_noise_sigma)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Convert noise levels to the network's timesteps."""
        return 0.25 * sigma.log()

    def sigma(self, timestep: Tensor) -> Tensor:
        """Convert the network's timesteps to noise levels."""
        return (4 * timestep).exp()

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the scheduler's grid, or the grid of exactly T ``sigmas``, from its sigma_max, and a final 0."""
        kind: Any = self.first_order
        scheduler = kind.from_config(self.scheduler.config)
        if sigmas is None:
            scheduler.set_timesteps(num_steps)
            return grid_of(scheduler)
        if not math.isclose(sigmas[0], largest := scheduler.config.sigma_max, rel_tol=1e-5):
            raise ValueError(f"sampling.sigmas must begin at this model's sigma_max, {largest}, not {sigmas[0]}")
        sigma = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
        return Grid(self.timestep(sigma[:-1]), torch.ones_like(sigma), sigma)

    def level(self, u: Tensor) -> NoiseLevel:
        """Return noise levels at timesteps linear in u (B,)."""
        config = self.scheduler.config
        ends = torch.tensor([config.sigma_min, config.sigma_max], dtype=torch.float64)
        low, high = self.timestep(ends).to(u.device)
        timestep = low + (high - low) * u.double()
        sigma = self.sigma(timestep)
        return NoiseLevel(timestep, torch.ones_like(sigma), sigma)

    def scale_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Divide latents (B, ...) by sqrt(sigma^2 + sigma_data^2)."""
        deviation = torch.hypot(level.sigma, torch.full_like(level.sigma, self.path.sigma_data))
        return x * expand(1 / deviation, x)


class CosineSchedule(EDMSchedule):
    """The path alpha = 1 of Stable Audio, whose network takes the timestep atan(sigma) 2 / pi, in [0, 1]."""

    first_order = CosineDPMSolverMultistepScheduler

    def timestep(self, sigma: Tensor) -> Tensor:
        """Convert noise levels to the network's timesteps."""
        return sigma.atan() * 2 / math.pi

    def sigma(self, timestep: Tensor) -> Tensor:
        """Convert the network's timesteps to noise levels."""
        return (timestep * math.pi / 2).tan()


class ScheduledPipeline(DiffusersPipeline):
    """A family with a ``NoiseSchedule``."""

    @property
    @abstractmethod
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the checkpoint's scheduler."""

    @property
    def first_order(self) -> type[SchedulerMixin]:
        """The scheduler of diffusers that supplies the noise levels."""
        return self.schedule.first_order

    @property
    def path(self) -> GaussianPath:
        """The interpolation that the network was trained on."""
        return self.schedule.path

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the first-order sampling grid of the checkpoint's scheduler, or of explicit ``sigmas``."""
        return self.schedule.grid(num_steps, sigmas)

    def level(self, u: Tensor) -> NoiseLevel:
        """Return noise levels for training at u in [0, 1] (B,)."""
        return self.schedule.level(u)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Draw latents (B, C, ...) at the first noise level."""
        return super().initial_noise(seeds) * self.schedule.first_std

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """Predict from latents (B, C, ...), in the scale that the network takes."""
        return super().predict(self.schedule.scale_input(x, level), level, conditioning, guidance)
