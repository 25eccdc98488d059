"""Views of an image under which its score ought not to change, and a reward of a view.

Two rewards, one of the images and one of a view of them, disagree where the reward is unsure:
``rewards.combine.UncertaintyDiscount`` over both is Ctrl-U's discount (arXiv 2410.11236) by views of one sample, our
form. Ctrl-U itself compares the losses of two one-step predictions, at two noise levels, of one condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from genalign.runtime.media import eight_bits
from genalign.types import AnyCallable, Prompt


@dataclass(frozen=True)
class ViewReward:
    """The score that a reward gives to a view of a sample.

    Args:
        reward: The reward that scores the view.
        view: A function of samples (B, ...) to as many samples, each of its own sample alone and always the same:
            ``Blurred``, ``Noised``, ``quantized``, or your own.
    """

    reward: AnyCallable
    view: AnyCallable

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,), differentiable where view and reward are.

        Raises ValueError for a view that returns another number of samples.
        """
        viewed = self.view(samples)
        if len(viewed) != len(samples):
            raise ValueError(f"the view made {len(viewed)} samples of {len(samples)}: return one for each")
        scores: Tensor = self.reward(viewed, prompts)
        return scores


@dataclass(frozen=True)
class Blurred:
    """Gaussian blur with a standard deviation of ``sigma`` pixels; 0 changes nothing."""

    sigma: float = 1.0

    def __post_init__(self) -> None:
        _require_strength("sigma", self.sigma)

    def __call__(self, images: Tensor) -> Tensor:
        """Blur images (B, 3, H, W), differentiable; their sides must be longer than 3 sigma."""
        if not self.sigma:
            return images
        blurred: Tensor = gaussian_blur(images, [2 * max(1, round(3 * self.sigma)) + 1] * 2, [self.sigma] * 2)
        return blurred


@dataclass(frozen=True)
class Noised:
    """Gaussian noise of standard deviation ``std``, the same for every image of a size; 0 changes nothing."""

    std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        _require_strength("std", self.std)

    def __call__(self, images: Tensor) -> Tensor:
        """Add noise to images (B, 3, H, W) and clamp them to [0, 1], differentiable."""
        noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(self.seed))
        return (images + self.std * noise.to(images)).clamp(0, 1)


def quantized(images: Tensor) -> Tensor:
    """Round images (B, 3, H, W) in [0, 1] to 8 bits, as a PNG file holds them; NaN stays NaN. No gradient."""
    return (eight_bits(images).to(images) / 255).masked_fill(images.isnan(), torch.nan)


def _require_strength(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, not {value}")
