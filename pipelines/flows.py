"""Rectified flows on the noise levels of diffusers' FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from genalign.diffusion.paths import FlowPath
from genalign.types import Grid, NoiseLevel
from pipelines.base import DiffusersPipeline


class FlowPipeline(DiffusersPipeline):
    """A family whose network predicts the velocity eps - x0 and is told sigma, mostly as 1000 sigma."""

    path = FlowPath()
    first_order = FlowMatchEulerDiscreteScheduler

    def _scheduler(self) -> Any:
        """The family's first-order scheduler, from the checkpoint's own configuration."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)

    def _own_sigmas(self, num_steps: int) -> list[float] | None:
        """What the diffusers pipeline gives its scheduler where the user gives nothing; None for nothing."""
        return None

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """The checkpoint's scheduler's grid for ``num_steps``, or exactly the given T ``sigmas`` and a final 0."""
        if sigmas is not None:
            sigma = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
            return Grid(timestep=sigma[:-1] * self._told, alpha=1 - sigma, sigma=sigma)
        scheduler = self._scheduler()
        mu = self._mu(scheduler.config) if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(num_steps, sigmas=self._own_sigmas(num_steps), mu=mu)
        sigma = scheduler.sigmas.double()
        return Grid(timestep=scheduler.timesteps.double(), alpha=1 - sigma, sigma=sigma)

    @property
    def _told(self) -> int:
        """What the network is told at sigma = 1."""
        return int(self.pipe.scheduler.config.num_train_timesteps)

    def _mu(self, config: Any) -> float:
        """Diffusers' ``calculate_shift``: linear in the number of image tokens."""
        tokens = (self.height // self.patch) * (self.width // self.patch)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (tokens - config.base_image_seq_len))

    def level(self, u: Tensor) -> NoiseLevel:
        """Noise levels for training at u in [0, 1] (B,), moved by the scheduler's shift as its grid is."""
        sigma = shifted(u.double(), self._shift())
        return NoiseLevel(timestep=sigma * self._told, alpha=1 - sigma, sigma=sigma)

    def _shift(self) -> float:
        """How many times more noise than signal there is at sigma = 1/2 of an unshifted grid."""
        config = self._scheduler().config
        return math.exp(self._mu(config)) if config.use_dynamic_shifting else float(config.shift)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Shift sigma / (1 + (shift - 1) sigma): more steps at high noise for a shift above 1 (arXiv 2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h/2 * w/2, 4 C) of two by two, as FLUX and Qwen-Image take them."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The latents (B, C, h, w) that ``pack`` was given."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)
