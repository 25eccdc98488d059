"""Rectified flows on the noise levels of diffusers' FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from genalign.diffusion.hypernetwork import gates_of_rows
from genalign.diffusion.paths import FlowPath
from genalign.types import Grid, NoiseLevel
from pipelines.base import DiffusersPipeline


class FlowPipeline(DiffusersPipeline):
    """A family whose network predicts the velocity eps - x0 from x and a multiple of sigma, mostly 1000 sigma."""

    path = FlowPath()
    first_order = FlowMatchEulerDiscreteScheduler
    shift_steps: ClassVar[int] = 50  # the number of steps whose shift training levels have, where it depends on it

    def default_sigmas(self, num_steps: int) -> list[float] | None:
        """Return the sigmas that the diffusers pipeline passes to its scheduler by default; None if it passes none."""
        return None

    @property
    def shift(self) -> float:
        """The ratio of noise to signal to which the scheduler shifts sigma = 1/2; see ``shifted``."""
        config = self._scheduler().config
        return math.exp(self.mu(config, self.shift_steps)) if config.use_dynamic_shifting else float(config.shift)

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the scheduler's grid for ``num_steps``, or the grid of exactly T ``sigmas`` and a final 0."""
        if sigmas is not None:
            sigma = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
            return Grid(timestep=sigma[:-1] * self._timestep_scale, alpha=1 - sigma, sigma=sigma)
        scheduler = self._scheduler()
        mu = self.mu(scheduler.config, num_steps) if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(num_steps, sigmas=self.default_sigmas(num_steps), mu=mu)
        sigma = scheduler.sigmas.double()
        return Grid(timestep=scheduler.timesteps.double(), alpha=1 - sigma, sigma=sigma)

    def level(self, u: Tensor) -> NoiseLevel:
        """Return noise levels for training at u in [0, 1] (B,), shifted as the grid of the scheduler is."""
        sigma = shifted(u.double(), self.shift)
        return NoiseLevel(timestep=sigma * self._timestep_scale, alpha=1 - sigma, sigma=sigma)

    @property
    def _timestep_scale(self) -> int:
        """The network's timestep at sigma = 1."""
        return int(self.pipe.scheduler.config.num_train_timesteps)

    def _scheduler(self) -> Any:
        config = self.pipe.scheduler.config
        shift = config.get("flow_shift", config.get("shift", 1.0))  # solvers of a higher order call it flow_shift
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)

    @property
    def image_tokens(self) -> int:
        """The number of tokens that the network takes an image in, by which the shift is dynamic."""
        return (self.height // self.patch) * (self.width // self.patch)

    def mu(self, config: Any, num_steps: int) -> float:
        """Return mu of the shift exp(mu) by diffusers' ``calculate_shift``, which is linear in the number of tokens."""
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (self.image_tokens - config.base_image_seq_len))


class PackedFlowPipeline(FlowPipeline):
    """A family whose network takes patches of two by two latent pixels as tokens, and 512 tokens of text."""

    text_tokens = 512

    @property
    def latent_channels(self) -> int:
        """The number C of channels of the latents; the network takes four times as many."""
        return super().latent_channels // 4

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the checkpoint's images in latent pixels."""
        side = int(self.pipe.default_sample_size)
        return side, side

    def default_sigmas(self, num_steps: int) -> list[float]:
        """Return T sigmas at equal distances, from 1 to 1 / T."""
        return even_sigmas(num_steps)


def even_sigmas(num_steps: int) -> list[float]:
    """Return T sigmas at equal distances, from 1 to 1 / T."""
    return [float(sigma) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]


def by_text_length(
    denoiser: nn.Module, mask: Tensor, device: torch.device, call: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Join what ``call(rows, length)`` returns for all samples with texts of one length, in the samples' order.

    Args:
        denoiser: What ``call`` runs for these samples alone.
        mask: 0 after a text's end, (B, tokens).
        device: The device of ``rows`` (n,).
        call: Returns the outputs (n, ...) of the samples ``rows``.
    """
    lengths = mask.sum(1).tolist()  # the one wait for the device
    groups = {length: [i for i, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))}
    if len(groups) == 1:
        return call(torch.arange(len(lengths), device=device), lengths[0])
    outputs = list[Tensor]()
    for length, members in groups.items():
        rows = torch.tensor(members, device=device)
        with gates_of_rows(denoiser, rows):
            outputs.append(call(rows, length))
    joined = torch.cat(outputs)
    return joined[torch.tensor([i for rows in groups.values() for i in rows], device=device).argsort()]


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Shift sigma / (1 + (shift - 1) sigma): more steps at high noise for a shift above 1 (arXiv 2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def pack(latents: Tensor) -> Tensor:
    """Pack latents (B, C, h, w) into tokens (B, h/2 * w/2, 4 C) of two by two latent pixels."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Invert ``pack``: tokens to latents (B, C, height, width)."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)
