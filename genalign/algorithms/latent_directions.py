"""Directions in which the clean latents of few-step students move: distribution matching, a proxy's gradient, rewards.

N counts latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genalign.algorithms.companions import HIGHEST, LOWEST, LearnedFakeScore, LearnedProxy, places
from genalign.algorithms.interfaces import ObjectiveTraits, PartMetrics, UpdateContext
from genalign.algorithms.pathwise import Ascent
from genalign.diffusion.noise import seeded_noise
from genalign.diffusion.rollout import rows_are_finite
from genalign.types import Prompt


def _finite_rows(direction: Tensor) -> Tensor:
    """Replace rows of a direction (N, ...) that are not finite by 0."""
    return torch.where(rows_are_finite(direction).view(-1, *[1] * (direction.ndim - 1)), direction, 0)


@dataclass(frozen=True)
class DistributionMatching:
    """A direction from the student's distribution to the teacher's, at clean latents x (DMD2, arXiv 2405.14867).

    The latents are noised to a uniform level; it is -(x0_fake - x0_real) / mean |x - x0_real|, for the clean estimates
    of the fake score and of the guided reference policy, divided by the number of values of a sample. With the weight
    (alpha / sigma)^2 in place of that quotient its mean would be the negative gradient of the Kullback-Leibler
    divergence of the noised distributions.

    Args:
        guidance: The teacher's guidance scale.
        low: The lowest noise level, as a fraction of the path's range.
        high: The highest noise level.
    """

    guidance: float = 1.0
    low: float = LOWEST
    high: float = HIGHEST

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or not self.guidance >= 1:
            raise ValueError(
                "low and high must be ascending fractions in [0, 1], and guidance 1 for none or more, not"
                f" {self.low}, {self.high} and {self.guidance}"
            )

    @property
    def traits(self) -> ObjectiveTraits:
        return ObjectiveTraits(student_guidance=self.guidance)

    def __call__(
        self, context: UpdateContext, latents: Tensor, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Tensor:
        """Return the direction (N, ...); the metric ``loss`` is the mean |x0_fake - x0_real|."""
        fake, real = self.estimates(context, latents, prompts, seeds)
        scale = (latents - real).abs().flatten(1).mean(1).clamp(min=torch.finfo(real.dtype).tiny)
        context.metrics.add("loss", (fake - real).abs().flatten(1).mean(1))
        direction = (real - fake) / scale.view(-1, *[1] * (latents.ndim - 1)) / latents[0].numel()
        return _finite_rows(direction).to(latents.dtype)

    @torch.no_grad()
    def estimates(
        self, context: UpdateContext, latents: Tensor, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the clean estimates (N, ...) of the fake score and of the guided reference, at one noised latent.

        Raises ValueError if the recipe has no fake score.
        """
        if not isinstance(context.companion, LearnedFakeScore):
            raise ValueError("distribution matching needs a fake score: give the recipe the companion FakeScore")
        pipeline, policy = context.pipeline, context.policy
        level, noise = pipeline.level(places(seeds, self.low, self.high)), seeded_noise(seeds, latents)
        conditioning = pipeline.encode(prompts).to(latents.device)
        x = pipeline.path.add_noise(latents, noise, level)
        with policy.using(context.companion.weights):
            fake = pipeline.path.x0(x, pipeline.predict(x, level, conditioning, 1.0), level)
        with policy.reference():
            real = pipeline.path.x0(x, pipeline.predict(x, level, conditioning, self.guidance), level)
        return fake, real


@dataclass(frozen=True)
class WeightedAscent:
    """The rewards' gradients times a weight, beside another direction; their metrics are ``reward/...``."""

    ascent: Ascent
    weight: float

    def __call__(
        self, context: UpdateContext, latents: Tensor, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Tensor:
        metrics = PartMetrics(context.metrics, "reward", 0.0, counted=False)
        return self.weight * self.ascent(replace(context, metrics=metrics), latents, prompts, seeds)


@dataclass(frozen=True)
class ProxyAscent:
    """The gradient of the recipe's proxy at clean latents, in place of the rewards'."""

    def __call__(
        self, context: UpdateContext, latents: Tensor, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Tensor:
        """Return the gradient (N, ...), 0 where it is not finite. Raises ValueError if the recipe has no proxy."""
        if not isinstance(context.companion, LearnedProxy):
            raise ValueError("the gradient of a proxy needs one: give the recipe the companion LatentProxy")
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            scores: Tensor = context.companion.network(leaf, prompts)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        context.metrics.add("loss", -scores)
        return _finite_rows(gradient)
