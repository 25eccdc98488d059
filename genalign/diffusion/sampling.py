"""Settings of plain sampling: the number of steps, the noise levels, the guidance scale and the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from genalign.diffusion.transitions import ODE, Kernel
from genalign.types import Grid, Pipeline


@dataclass(frozen=True)
class Sampling:
    """Settings of plain sampling.

    Args:
        num_steps: The number of steps T of the sampling grid.
        sigmas: The noise levels (T), descending, without the final 0; null takes the grid of the checkpoint's
            scheduler.
        guidance: The classifier-free guidance scale; 1 is no guidance, null the default of the model's family.
        kernel: Sampler for every step; in training, for the steps that the recipe does not train. Null is the
            deterministic ODE. ``CPS`` with ``eta: 1`` noises each step's clean estimate again, as few-step students
            are sampled (multistep consistency sampling, arXiv 2303.01469, algorithm 1).
    """

    num_steps: int = 10
    sigmas: Sequence[float] | None = None
    guidance: float | None = None
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"sampling.num_steps must be at least 1, not {self.num_steps}")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise ValueError(f"sampling.guidance must be 1 for none, or more, not {self.guidance}")
        if self.sigmas is None:
            return
        if len(self.sigmas) != self.num_steps:
            raise ValueError(
                f"sampling.sigmas has {len(self.sigmas)} values for {self.num_steps} steps: give one per step, without"
                " the final 0"
            )
        if any(a <= b for a, b in pairwise([*self.sigmas, 0.0])):
            raise ValueError(f"sampling.sigmas must fall from the first to a last above 0, not {list(self.sigmas)}")

    def grid(self, pipeline: Pipeline) -> Grid:
        """Build the sampling grid of ``pipeline`` for these settings."""
        return pipeline.grid(self.num_steps, self.sigmas)

    def guidance_scale(self, pipeline: Pipeline) -> float:
        """Return the guidance scale to sample ``pipeline`` with. Raises ValueError for one that it does not take."""
        return pipeline.guidance_scale(self.guidance)

    def kernel_on(self, grid: Grid) -> Kernel:
        """Return the kernel of every step of a grid.

        Raises ValueError for a kernel that is not defined on its steps, or that leaves noise in the samples.
        """
        kernel = self.kernel or ODE()
        moves = [kernel(grid[index]) for index in range(len(grid))]
        if bool(moves[-1].s > 0):
            raise ValueError(
                f"sampling.kernel {kernel} ends in noise, which stays in the samples: choose ODE, CPS, DDIM or DPMSDE"
            )
        return kernel
