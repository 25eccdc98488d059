"""Noise hypernetworks (arXiv 2508.09968): an adapter that shifts the initial noise, and is off in all later steps.

The shift of noise eps is f(eps) = prediction with the adapter - prediction without it, both at the first noise level.
It is exactly 0 for a new adapter. Sampling goes on from eps + f(eps) under the reference policy, and costs two more NFE
for each sample, or four under guidance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from genalign.diffusion.lora import adapters_enabled, disable_adapters
from genalign.diffusion.paths import expand
from genalign.types import Conditioning, NoiseLevel, Pipeline

_MARK = "_genalign_shifts_noise"


def make_noise_hypernetwork(network: nn.Module) -> None:
    """Let the adapter of ``network`` only shift the initial noise: it is off from now on, except for the shift."""
    setattr(network, _MARK, True)
    disable_adapters(network)


@contextlib.contextmanager
def without_shift(network: nn.Module) -> Iterator[None]:
    """Sample from the noise itself within the context."""
    before = shifts_noise(network)
    setattr(network, _MARK, False)
    try:
        yield
    finally:
        setattr(network, _MARK, before)


def shifts_noise(network: nn.Module) -> bool:
    """Whether the adapter of ``network`` is a noise hypernetwork."""
    return bool(getattr(network, _MARK, False))


def add_shift(noise: Tensor, trained: Tensor, reference: Tensor, level: NoiseLevel) -> Tensor:
    """Shift noise (N, ...) by the difference of two predictions (N, ...) at ``level``.

    The shift is in units of the noise, which latents of a path with alpha = 1 hold sigma times.
    """
    return noise + expand(level.sigma, noise) * (trained - reference)


def first_latents(
    pipeline: Pipeline, noise: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float
) -> Tensor:
    """Return the latents (N, ...) that sampling begins with: the noise, shifted if the model has a noise hypernetwork.

    Args:
        pipeline: The model.
        noise: The initial noise (N, ...).
        level: The first level of the grid.
        conditioning: Conditioning of N rows.
        guidance: The classifier-free guidance scale of both predictions; 1 is none.
    """
    if not shifts_noise(pipeline.denoiser):
        return noise
    reference = pipeline.predict(noise, level, conditioning, guidance)
    with adapters_enabled(pipeline.denoiser, True):
        trained = pipeline.predict(noise, level, conditioning, guidance)
    return add_shift(noise, trained, reference, level)
