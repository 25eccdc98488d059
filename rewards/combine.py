"""Combinations of rewards, and credit over an ensemble of them.

Combinations of single samples are rewards again and can be nested: ``WeightedSum``, ``Product``, ``WorstCase``,
``MeanMinusVariance``, ``Standardized``, ``LogSigmoidCentered``, ``Gate``, ``DirectionalCorrection``. A sum or a minimum
of rewards in different units is meaningless: put each into ``Standardized`` first, whose statistics are fixed, so that
a score does not depend on its batch. Combinations that need whole groups are credits of a recipe: ``EnsembleCredit``
and ``UncertaintyDiscount``; the sum of rewards that are normalized within their group is
``genalign.algorithms.credit.NormalizedSum``.

A sample that a member could not score has score NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.algorithms.advantages import group_advantages
from genalign.algorithms.interfaces import Credit, RoundScores
from genalign.scoring.combine import combine
from genalign.types import AnyCallable, Prompt, RewardFunction
from rewards.backbones.clip_encoder import ClipEncoder
from rewards.backbones.encoders import cosine
from rewards.backbones.weight_files import read_tensors

_DIRECTION = "direction"


def worst_case(scores_BK: Tensor) -> Tensor:
    """The least of K scores, (B,): worst-case optimization (arXiv 2310.02743)."""
    return _table(scores_BK).amin(1)


def mean_minus_variance(scores_BK: Tensor, penalty: float = 0.5, ddof: int = 0) -> Tensor:
    """The mean of K scores less ``penalty`` times their variance, (B,): uncertainty-weighted optimization (arXiv
    2310.02743).

    Its authors take a penalty of 0.5 and ddof 0 to choose the best of n, and 0.1 and ddof 1 to train. Raises ValueError
    for K not above ddof.
    """
    if _table(scores_BK).shape[1] <= ddof:
        raise ValueError(f"a variance with ddof {ddof} needs more than {ddof} scores, not {scores_BK.shape[1]}")
    return scores_BK.mean(1) - penalty * scores_BK.var(1, correction=ddof)


@dataclass(frozen=True)
class WeightedSum:
    """The sum of weight times score."""

    rewards: Sequence[AnyCallable]
    weights: Sequence[float]

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        return combine(_scores(self.rewards, samples, prompts), self.weights)


@dataclass(frozen=True)
class Product:
    """The product of scores that are 0 or more, such as probabilities: one that is 0 makes it 0."""

    rewards: Sequence[AnyCallable]

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,). Raises ValueError for a negative score: the product of two would be positive."""
        scores = _scores(self.rewards, samples, prompts)
        if bool((scores < 0).any()):
            raise ValueError(
                "a product is for scores of 0 or more: put the others through LogSigmoidCentered and a sum"
            )
        return scores.prod(1)


@dataclass(frozen=True)
class WorstCase:
    """``worst_case`` of rewards in the same units: members of an ensemble, or each of them ``Standardized``."""

    rewards: Sequence[AnyCallable]

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        return worst_case(_scores(self.rewards, samples, prompts))


@dataclass(frozen=True)
class MeanMinusVariance:
    """``mean_minus_variance`` of rewards in the same units, as in ``WorstCase``."""

    rewards: Sequence[AnyCallable]
    penalty: float = 0.5
    ddof: int = 0

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        return mean_minus_variance(_scores(self.rewards, samples, prompts), self.penalty, self.ddof)


@dataclass(frozen=True)
class Standardized:
    """(score - mean) / std with fixed statistics: given, or taken from reference samples by ``measured``."""

    reward: AnyCallable
    mean: float
    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive, not {self.std}: the reward tells no sample from another")

    @classmethod
    def measured(cls, reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt]) -> Standardized:
        """Take the statistics from these samples, without unscored ones. Raises ValueError for equal scores."""
        scores = _detached(reward, samples, prompts)
        scores = scores[scores.isfinite()]
        if len(scores) < 2:
            raise ValueError(f"needs scores of at least 2 samples, got {len(scores)}: measure on more")
        return cls(reward, float(scores.mean()), float(scores.std(correction=0)))

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        scores: Tensor = (self.reward(samples, prompts) - self.mean) / self.std
        return scores


@dataclass(frozen=True)
class LogSigmoidCentered:
    """log sigmoid(scale (score - reference)), at most 0: beyond the reference there is little more to gain (arXiv
    2402.00742).

    The sum over rewards is the log-probability that a sample is good by all of them. ``reference`` is one for all
    prompts, or by their text, as ``reference_levels`` finds them. ``scale`` brings the score to logits of a preference:
    1 for PickScore and ImageReward, 100 for HPS and other cosines.
    """

    reward: AnyCallable
    reference: float | Mapping[str, float]
    scale: float = 1.0

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,). Raises ValueError for a prompt without a reference level."""
        scores: Tensor = self.reward(samples, prompts)
        if not isinstance(self.reference, Mapping):
            return F.logsigmoid(self.scale * (scores - self.reference))
        for prompt in prompts:
            if prompt.text not in self.reference:
                raise ValueError(f"the prompt {prompt.text!r} has no reference level: score base samples of it first")
        levels = scores.new_tensor([self.reference[prompt.text] for prompt in prompts])
        return F.logsigmoid(self.scale * (scores - levels))


def reference_levels(
    reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt], deviations: float = 1.0364
) -> dict[str, float]:
    """For every prompt's text, the mean score of its samples plus ``deviations`` standard deviations (ddof 0).

    For samples of the model before training; 1.0364 is the 85th percentile of a normal distribution. Raises ValueError
    for a prompt without a score.
    """
    by_text: dict[str, list[float]] = {prompt.text: [] for prompt in prompts}
    for prompt, score in zip(prompts, _detached(reward, samples, prompts).tolist(), strict=True):
        by_text[prompt.text].append(score)
    levels = {}
    for text, values in by_text.items():
        scores = torch.tensor(values)
        scores = scores[scores.isfinite()]
        if not len(scores):
            raise ValueError(f"no sample of {text!r} could be scored: sample it again")
        levels[text] = float(scores.mean() + deviations * scores.std(correction=0))
    return levels


@dataclass(frozen=True)
class Gate:
    """The score of ``reward`` where ``condition`` scores ``threshold`` or more, else ``otherwise``."""

    reward: AnyCallable
    condition: AnyCallable
    threshold: float
    otherwise: float = 0.0

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,); NaN where the condition could not be scored, and where the reward could not and the gate is open."""
        score, condition = _scores([self.reward, self.condition], samples, prompts).unbind(1)
        gated = torch.where(condition >= self.threshold, score, self.otherwise)
        return torch.where(condition.isnan(), torch.nan, gated)


class DualEncoderReward(Protocol):
    """A reward with a text and image encoder, such as ``ClipReward``, ``PickScoreReward`` and ``HPSReward``."""

    def encoder(self, device: torch.device) -> ClipEncoder:
        """Load the encoder and move it to ``device``."""


@dataclass(frozen=True, eq=False)
class DirectionalCorrection:
    """D2-Align's guided reward (arXiv 2512.24146, eq. 6 to 9): the cosine of the image with a text embedding that is
    moved along ``direction`` (d,), which has learnt what the reward overrates.

    With ``learned_direction`` of the model's samples before training, fixed from then on. ``direction`` may be the file
    that ``save_direction`` wrote.
    """

    base: DualEncoderReward
    direction: Tensor | str
    omega: float = 1.5

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], differentiable; NaN where an image has NaN."""
        image, text = embedded(self.base, samples, prompts)
        return cosine(image, guided_text(text, self._direction.to(text), self.omega))

    @cached_property
    def _direction(self) -> Tensor:
        if isinstance(self.direction, Tensor):
            return self.direction
        tensors = read_tensors(self.direction)
        if _DIRECTION not in tensors:
            raise ValueError(f"{self.direction} holds no direction: write one with save_direction")
        return tensors[_DIRECTION]


def embedded(base: DualEncoderReward, samples: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Unit embeddings (B, d) of images and of their prompts."""
    encoder = base.encoder(samples.device)
    return F.normalize(encoder(samples), dim=-1), encoder.text([prompt.text for prompt in prompts])


def guided_text(text: Tensor, direction: Tensor, omega: float) -> Tensor:
    """e- + omega (e+ - e-) for e+- = the unit vectors along text +- direction; (B, d), not of length 1."""
    plus, minus = F.normalize(text + direction, dim=-1), F.normalize(text - direction, dim=-1)
    return minus + omega * (plus - minus)


def learned_direction(
    image: Tensor,
    text: Tensor,
    omega: float = 1.5,
    steps: int = 2000,
    learning_rate: float = 5e-6,
    batch_size: int = 32,
    seed: int = 0,
) -> Tensor:
    """The direction (d,) that raises the guided reward of a frozen model's samples most (arXiv 2512.24146, stage 1).

    ``image`` and ``text`` are their embeddings (n, d), by ``embedded``. AdamW from 0 with weight decay 1e-4 and
    gradients of length 0.1 at most, as published; there the effect was stable after 2000 steps.
    """
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"embeddings must be (n, d) and (n, d), not {tuple(image.shape)} and {tuple(text.shape)}")
    image, text = image.detach().float(), text.detach().float()
    direction = torch.zeros(image.shape[1], device=image.device, requires_grad=True)
    optimizer = torch.optim.AdamW([direction], lr=learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(image), (min(batch_size, len(image)),), generator=generator).to(image.device)
        with torch.enable_grad():
            loss = -cosine(image[rows], guided_text(text[rows], direction, omega)).mean()
        (direction.grad,) = torch.autograd.grad(loss, direction)
        torch.nn.utils.clip_grad_norm_([direction], 0.1)
        optimizer.step()
    return direction.detach()


def save_direction(path: str | Path, direction: Tensor) -> None:
    """Write a direction (d,) as safetensors."""
    from safetensors.torch import save_file

    save_file({_DIRECTION: direction.detach().cpu().contiguous()}, Path(path))


@dataclass(frozen=True)
class EnsembleCredit:
    """The rewards of non-zero weight, each normalized within its group, then ``pool``-ed and normalized again: (B,).

    ``pool`` is ``worst_case``, ``mean_minus_variance`` or any function from (B, K) to (B,). Rewards of preferences are
    only known up to a constant per prompt, so that a minimum of them without that would mean nothing (arXiv
    2312.09244). A sample that a reward could not score gets 0.
    """

    pool: AnyCallable = worst_case

    def __call__(self, outcome: RoundScores) -> Tensor:
        """Advantages (B,), as in ``genalign.algorithms.advantages.group_advantages``."""
        return group_advantages(self.pool(_normalized_members(outcome)), outcome.group)


@dataclass(frozen=True)
class UncertaintyDiscount:
    """``credit`` times exp(-strength U) for U = the standard deviation of a sample's rewards of non-zero weight, each
    normalized within its group: what they disagree about teaches less (Ctrl-U, arXiv 2410.11236).

    It is the credit that shrinks and not the reward, as a bad reward would grow. Meant for rewards that ought to agree.
    """

    credit: Credit
    strength: float = 1.0

    def __call__(self, outcome: RoundScores) -> Tensor:
        """(B,) or (B, S), as ``credit`` has it; 0 where a reward is missing."""
        disagreement = _normalized_members(outcome).std(1, correction=0)
        factor = torch.exp(-self.strength * disagreement).nan_to_num(0.0)
        credit = self.credit(outcome)
        return credit * factor.to(credit.device).view(-1, *[1] * (credit.ndim - 1))


def _normalized_members(outcome: RoundScores) -> Tensor:
    """The scores (B, K') of non-zero weight, normalized within their group; NaN where one is missing."""
    columns = [
        torch.where(scores.isnan(), torch.nan, group_advantages(scores, outcome.group, clip=None))
        for scores, weight in zip(outcome.scores.unbind(1), outcome.weights, strict=True)
        if weight
    ]
    if len(columns) < 2:
        raise ValueError(f"an ensemble needs 2 rewards or more of non-zero weight, not {len(columns)}")
    return torch.stack(columns, 1)


def _scores(rewards: Sequence[RewardFunction], samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """(B, K) in float32, where the samples are."""
    if not rewards:
        raise ValueError("there are no rewards to combine: give at least one")
    return torch.stack([reward(samples, prompts).to(samples.device).float() for reward in rewards], 1)


@torch.no_grad()
def _detached(reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return reward(samples, prompts).float().cpu()


def _table(scores_BK: Tensor) -> Tensor:
    if scores_BK.ndim != 2 or not scores_BK.shape[1]:
        raise ValueError(f"scores must be (B, K) with K > 0, not {tuple(scores_BK.shape)}")
    return scores_BK
