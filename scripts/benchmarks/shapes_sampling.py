"""How shapes-sd3 is sampled in a number of steps, as in the configurations of scripts/configs."""

from __future__ import annotations

import torch

from genalign.diffusion.sampling import Sampling
from pipelines.flows import shifted
from scripts.pretrain.shapes_models import SHIFT


def shapes_sampling(steps: int) -> Sampling:
    """Return the sampling settings without guidance: even noise levels from 1, shifted as the scheduler shifts them."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return Sampling(steps, shifted(even, SHIFT).tolist(), guidance=1.0)
