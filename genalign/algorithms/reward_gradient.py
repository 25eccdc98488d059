"""The gradient of rewards at clean latents, through the decoder.

The rewards are differentiated first, at the decoded samples, and then the decoder, whose cotangent is scaled near 1 by
a power of two. That is exact, and keeps small gradients from underflowing in a float16 decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.diffusion.rollout import rows_are_finite
from genalign.scoring.score import NamedReward, score
from genalign.types import Pipeline, Prompt


@dataclass(frozen=True)
class LatentGradient:
    """The rewards of N clean latents, and their gradient.

    Attributes:
        samples: The decoded samples (N, ...).
        scores: Scores (N, K); NaN where a reward failed.
        gradient: The gradient (N, ...) of the weighted sum at the latents; 0 where it is not finite.
    """

    samples: Tensor
    scores: Tensor
    gradient: Tensor

    @classmethod
    def joined(cls, parts: Sequence[LatentGradient]) -> LatentGradient:
        """Join the gradients of consecutive latents."""
        fields = zip(*((part.samples, part.scores, part.gradient) for part in parts), strict=True)
        return cls(*map(torch.cat, fields))


def latent_gradient(
    pipeline: Pipeline,
    rewards: Sequence[NamedReward],
    latents: Tensor,
    prompts: Sequence[Prompt],
    ceiling: float | None = None,
    normalize_gradients: bool = False,
) -> LatentGradient:
    """Differentiate the weighted sum of rewards at clean latents.

    A reward of weight 0 is reported only, and needs no gradient.

    Args:
        pipeline: The model, whose decoder is used.
        rewards: K rewards.
        latents: Clean latents (N, ...), which need no gradient.
        prompts: Their prompts (N).
        ceiling: The weighted sum above which a sample has no gradient, as for min(reward, ceiling).
        normalize_gradients: Divide the gradient of each reward at each decoded sample by its length, so only the
            weights of the rewards set their influence (Reward-Instruct, arXiv 2503.13070).

    Raises:
        ValueError: A reward of non-zero weight has no gradient; the message names it.
    """
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        decoded = pipeline.decode(leaf)
    samples = decoded.detach()
    finite = rows_are_finite(samples)
    scores, gradient = _at_samples(
        rewards, torch.where(_rows(finite, samples), samples, 0), prompts, ceiling, normalize_gradients
    )
    gradient = torch.where(_rows(finite & rows_are_finite(gradient), gradient), gradient, 0)
    largest = gradient.abs().max() if gradient.numel() else gradient.new_zeros(())  # a run that only counts has none
    _, exponent = torch.frexp(largest)
    (at_latents,) = torch.autograd.grad(decoded, leaf, torch.ldexp(gradient, -exponent))
    at_latents = torch.ldexp(at_latents, exponent)
    at_latents = torch.where(_rows(finite & rows_are_finite(at_latents), at_latents), at_latents, 0)
    return LatentGradient(samples, torch.where(finite[:, None], scores, torch.nan), at_latents)


def _rows(rows: Tensor, tensor: Tensor) -> Tensor:
    """Reshape one number per row (N,) to broadcast with a tensor (N, ...)."""
    return rows.view(-1, *[1] * (tensor.ndim - 1))


def _at_samples(
    rewards: Sequence[NamedReward],
    samples: Tensor,
    prompts: Sequence[Prompt],
    ceiling: float | None,
    normalize_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """Score samples as (N, K), and differentiate the weighted sum at them, (N, ...)."""
    leaf = samples.requires_grad_()
    columns, total = list[Tensor](), torch.zeros_like(samples)
    counted = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    for reward in rewards:
        if not reward.weight:
            columns.append(score([reward], leaf.detach(), prompts)[:, 0].to(leaf.device))
            continue
        values = _differentiable_scores(reward, leaf, prompts)
        (gradient,) = torch.autograd.grad(values.sum(), leaf, materialize_grads=True)
        if normalize_gradients:
            length = gradient.flatten(1).norm(dim=1)
            gradient = gradient / _rows(torch.where(length > 0, length, 1), gradient)
        total += reward.weight * gradient
        columns.append(values.detach().float().to(leaf.device))
        counted += reward.weight * columns[-1]
    ascends = counted.isfinite() if ceiling is None else counted < ceiling
    return torch.stack(columns, dim=1), torch.where(_rows(ascends, total), total, 0)


def _differentiable_scores(reward: NamedReward, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Score samples (N, ...) that require a gradient, as (N,). Raises ValueError for a reward without one."""
    with torch.enable_grad():
        scores = reward(samples, prompts)
    if not scores.requires_grad:
        raise ValueError(
            f"reward {reward.name!r} has no gradient: give it weight 0, or choose what needs none, such as the"
            " recipe flow_grpo, the strategies ZeroOrder and Evolution, or the guide DoobGuide"
        )
    return scores


def require_gradients(rewards: Sequence[NamedReward], samples: Tensor, prompts: Sequence[Prompt]) -> None:
    """Call every reward of non-zero weight on samples (N, ...), to find one without a gradient before training starts.

    Raises:
        ValueError: A reward of non-zero weight has no gradient; the message names it.
        RewardError: A reward does not accept samples that require a gradient.
    """
    for reward in rewards:
        if reward.weight:
            _differentiable_scores(reward, samples.detach().requires_grad_(), prompts)
