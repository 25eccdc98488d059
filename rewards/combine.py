"""Combinations of rewards, and credit over an ensemble of them.

Combinations of single samples are rewards again and can be nested: ``WeightedSum``, ``Product``, ``HarmonicMean``,
``WorstCase``, ``MeanMinusVariance``, ``Standardized``, ``Gate``, ``DirectionalCorrection``, ``TextRelativeReward``. A
sum or a minimum of rewards in different units is meaningless: put each into ``Standardized`` first, whose statistics
are fixed, so a score does not depend on its batch; bounded shapes of one reward are in ``rewards.shaped``.
Combinations that need whole groups are credits of a recipe: ``EnsembleCredit`` and ``UncertaintyDiscount``; others are
in ``genalign.algorithms.credit`` and ``genalign.algorithms.multi_reward_credit``.

A sample that a member could not score has score NaN. Where a gradient is followed, each member must have one, but for a
member of weight 0 and the condition of a ``Gate``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.algorithms.advantages import group_advantages
from genalign.algorithms.interfaces import RoundScores
from genalign.runtime.files import apply_umask
from genalign.scoring.score import combine, require_gradient
from genalign.types import AnyCallable, Prompt, RewardFunction
from rewards.backbones.clip_encoder import ClipEncoder
from rewards.backbones.encoders import cosine
from rewards.backbones.weight_files import read_tensors

_DIRECTION = "direction"


def worst_case(scores_BK: Tensor) -> Tensor:
    """Take the least of K scores, (B,): worst-case optimization (arXiv 2310.02743)."""
    return scores_BK.amin(1)


def median(scores_BK: Tensor) -> Tensor:
    """Take the median of K scores, (B,): of an even number the mean of the middle two (arXiv 2312.09244)."""
    return scores_BK.quantile(0.5, dim=1)


@dataclass(frozen=True)
class VariancePenalty:
    """The mean of K scores less a part of their variance: uncertainty-weighted optimization (arXiv 2310.02743).

    The defaults are the published ones to train; to choose the best of n its authors take a penalty of 0.5 and ddof 0.

    Args:
        penalty: The factor of the variance.
        ddof: The number subtracted from K in the variance.
    """

    penalty: float = 0.1
    ddof: int = 1

    def __call__(self, scores_BK: Tensor) -> Tensor:
        """Pool scores (B, K) as (B,). Raises ValueError for K not above ddof."""
        _require_more_than(self.ddof, scores_BK)
        return scores_BK.mean(1) - self.penalty * scores_BK.var(1, correction=self.ddof)


@dataclass(frozen=True)
class DeviationPenalty:
    """The mean of K scores less a part of their standard deviation (arXiv 2312.09244).

    Args:
        penalty: The factor of the standard deviation.
        ddof: The number subtracted from K in the standard deviation.
    """

    penalty: float = 1.0
    ddof: int = 0

    def __call__(self, scores_BK: Tensor) -> Tensor:
        """Pool scores (B, K) as (B,). Raises ValueError for K not above ddof."""
        _require_more_than(self.ddof, scores_BK)
        return scores_BK.mean(1) - self.penalty * scores_BK.std(1, correction=self.ddof)


@dataclass(frozen=True)
class NominalAndWorst:
    """The mean of K scores, mixed with their minimum: our form of robust RLHF.

    Args:
        nominal: The weight of the mean, in [0, 1]; the rest is that of the minimum.
    """

    nominal: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.nominal <= 1:
            raise ValueError(f"nominal is the weight of the mean, in [0, 1], not {self.nominal}")

    def __call__(self, scores_BK: Tensor) -> Tensor:
        """Pool scores (B, K) as (B,)."""
        return self.nominal * scores_BK.mean(1) + (1 - self.nominal) * scores_BK.amin(1)


def _require_more_than(ddof: int, scores_BK: Tensor) -> None:
    if scores_BK.shape[1] <= ddof:
        raise ValueError(f"a variance with ddof {ddof} needs more than {ddof} scores, not {scores_BK.shape[1]}")


@dataclass(frozen=True)
class WeightedSum:
    """The sum of weight times score.

    Args:
        rewards: The rewards to add up.
        weights: The weights of the rewards, one for each in their order.
    """

    rewards: Sequence[AnyCallable]
    weights: Sequence[float]

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        constant = [place for place, weight in enumerate(self.weights) if not weight]
        return combine(_scores(self.rewards, samples, prompts, constant), self.weights)


@dataclass(frozen=True)
class Product:
    """The product of scores that are 0 or more, such as probabilities: one that is 0 makes it 0.

    Args:
        rewards: The rewards to multiply.
    """

    rewards: Sequence[AnyCallable]

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,). Raises ValueError for a negative score: the product of two would be positive."""
        scores = _scores(self.rewards, samples, prompts)
        if bool((scores < 0).any()):
            raise ValueError("a product needs scores of 0 or more: put the others through LogSigmoidCentered and a sum")
        return scores.prod(1)


@dataclass(frozen=True)
class HarmonicMean:
    """The weighted harmonic mean of scores that are 0 or more, which the smallest of them dominates.

    With weights l and 1 - l of the similarities of a subject and of a text, (cosine + 1) / 2 each, this is the
    lambda-harmonic reward of RPO (arXiv 2407.12164): ``Standardized(reward, mean=-1, std=2)`` maps a cosine so.

    Args:
        rewards: The rewards to average.
        weights: Positive weights of the rewards, one for each in their order, which are divided by their sum; null
            weighs all alike.
    """

    rewards: Sequence[AnyCallable]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and (len(self.weights) != len(self.rewards) or not min(self.weights) > 0):
            raise ValueError(f"weights must be one positive number for each reward, not {list(self.weights)}")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiable where the rewards are. Raises ValueError for a negative score."""
        scores = _scores(self.rewards, samples, prompts)
        if bool((scores < 0).any()):
            raise ValueError("a harmonic mean needs scores of 0 or more: map cosines by Standardized(mean=-1, std=2)")
        weights = scores.new_tensor(self.weights or [1.0] * scores.shape[1], dtype=torch.float64)
        return (weights.sum() / (weights / (scores.double() + 1e-8)).sum(1)).float()


@dataclass(frozen=True)
class WorstCase:
    """The least of several scores, see ``worst_case``.

    Args:
        rewards: Rewards in the same units: members of an ensemble, or each of them ``Standardized``.
    """

    rewards: Sequence[AnyCallable]

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return worst_case(_scores(self.rewards, samples, prompts))


@dataclass(frozen=True)
class MeanMinusVariance:
    """The mean of several scores less a part of their variance, see ``VariancePenalty``.

    Args:
        rewards: Rewards in the same units: members of an ensemble, or each of them ``Standardized``.
        penalty: The factor of the variance: published with 0.5 to choose the best of n, and 0.1 to train.
        ddof: The number subtracted from the count of rewards in the variance: published with 0 to choose the best of n,
            and 1 to train.
    """

    rewards: Sequence[AnyCallable]
    penalty: float = 0.5
    ddof: int = 0

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return VariancePenalty(self.penalty, self.ddof)(_scores(self.rewards, samples, prompts))


@dataclass(frozen=True)
class Standardized:
    """(score - mean) / std with fixed statistics: given, or taken from reference samples by ``measured``.

    Args:
        reward: The reward to standardize.
        mean: The mean score of reference samples.
        std: The standard deviation of the scores of reference samples, above 0.
    """

    reward: AnyCallable
    mean: float
    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive, not {self.std}: the reward tells no sample from another")

    @classmethod
    def measured(cls, reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt]) -> Standardized:
        """Measure the statistics on these samples, without unscored ones. Raises ValueError for equal scores."""
        with torch.no_grad():
            scores = reward(samples, prompts).float().cpu()
        scores = scores[scores.isfinite()]
        if len(scores) < 2:
            raise ValueError(f"needs scores of at least 2 samples, got {len(scores)}: measure on more")
        return cls(reward, float(scores.mean()), float(scores.std(correction=0)))

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores: Tensor = (self.reward(samples, prompts) - self.mean) / self.std
        return scores


@dataclass(frozen=True)
class Gate:
    """The score of ``reward`` where ``condition`` scores ``threshold`` or more, else ``otherwise``.

    Args:
        reward: The reward that counts where the gate is open.
        condition: The reward that opens the gate.
        threshold: The lowest score of the condition that opens the gate, in its units.
        otherwise: The score where the gate is closed, in units of ``reward``.
    """

    reward: AnyCallable
    condition: AnyCallable
    threshold: float
    otherwise: float = 0.0

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,); NaN where the condition has no score, or the gate is open and the reward has none."""
        score, condition = _scores([self.reward, self.condition], samples, prompts, constant=[1]).unbind(1)
        gated = torch.where(condition >= self.threshold, score, self.otherwise)
        return torch.where(condition.isnan(), torch.nan, gated)


class DualEncoderReward(Protocol):
    """A reward with a text and image encoder, such as ``ClipReward``, ``PickScoreReward`` and ``HPSReward``."""

    def encoder(self, device: torch.device | None) -> ClipEncoder:
        """Load the encoder and move it to ``device``, or leave it where it is."""


@dataclass(frozen=True, eq=False)
class DirectionalCorrection:
    """The cosine of an image with its prompt's embedding, moved away from what the reward overrates.

    This is D2-Align's guided reward (arXiv 2512.24146, eq. 6 to 9).

    Args:
        base: The reward whose encoder is used.
        direction: The file that ``genalign reward direction`` wrote, or a tensor (d,) of ``learned_direction``: it is
            learned on the model's samples before training, and then fixed.
        omega: The strength of the guidance, see ``guided_text``: 1 takes the text's embedding moved along the
            direction, and more moves it further.
    """

    base: DualEncoderReward
    direction: Tensor | str
    omega: float = 1.5

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), differentiable; NaN where an image has NaN."""
        image, text = embedded(self.base, samples, prompts)
        direction = self._direction.to(text)
        if direction.shape != text.shape[1:]:
            raise ValueError(
                f"the direction has shape {tuple(direction.shape)}, and the embeddings of this encoder have"
                f" {text.shape[1]} dimensions: learn one for it with genalign reward direction"
            )
        return cosine(image, guided_text(text, direction, self.omega))

    def learn_direction(self, batches: Iterable[tuple[Tensor, Sequence[Prompt]]], path: Path, seed: int) -> None:
        """Learn the direction from samples before training and their prompts, and write it to a file.

        Args:
            batches: Images (B, 3, H, W) in [0, 1] of the model before training, with their prompts.
            path: The safetensors file, for ``direction``.
            seed: Of the batches of ``learned_direction``.
        """
        with torch.no_grad():
            pairs = [embedded(self.base, samples, prompts) for samples, prompts in batches]
        image, text = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        save_direction(path, learned_direction(image, text, self.omega, seed=seed))

    @cached_property
    def _direction(self) -> Tensor:
        if isinstance(self.direction, Tensor):
            return self.direction
        tensors = read_tensors(self.direction)
        if _DIRECTION not in tensors:
            raise ValueError(f"{self.direction} holds no direction: write one with genalign reward direction")
        return tensors[_DIRECTION]


@dataclass(frozen=True, eq=False)
class TextRelativeReward:
    """(1 + k) cos(image, positive + prompt) - cos(image, negative + prompt): SRPO's reward (arXiv 2509.06942).

    What both texts reward alike, such as a style that the encoder likes in every picture, cancels but for k.

    Args:
        base: The reward whose encoder is used.
        positive: The words before the prompt that say what is wanted, such as "realistic".
        negative: The words before the prompt that say what is not.
        k: How much more the positive text counts.
    """

    base: DualEncoderReward
    positive: str
    negative: str
    k: float = 0.1

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), differentiable; NaN where an image has NaN."""
        texts = [[f"{words} {prompt.text}".strip() for prompt in prompts] for words in (self.positive, self.negative)]
        encoder = self.base.encoder(samples.device)
        image, (positive, negative) = F.normalize(encoder(samples), dim=-1), map(encoder.text, texts)
        return (1 + self.k) * cosine(image, positive) - cosine(image, negative)


def embedded(base: DualEncoderReward, samples: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Compute unit embeddings (B, d) of images, and of their prompts."""
    encoder = base.encoder(samples.device)
    return F.normalize(encoder(samples), dim=-1), encoder.text([prompt.text for prompt in prompts])


def guided_text(text: Tensor, direction: Tensor, omega: float) -> Tensor:
    """Compute e- + omega (e+ - e-), where e+ and e- are the unit vectors along text +- direction; (B, d)."""
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
    """Learn the direction (d,) that raises the guided reward of a frozen model's samples most.

    This is stage 1 of arXiv 2512.24146: AdamW from 0, with weight decay 1e-4 and gradients clipped to length 0.1.

    Args:
        image: embeddings (n, d) of samples, by ``embedded``.
        text: embeddings (n, d) of their prompts.
        omega: the factor of ``guided_text``.
        steps: optimizer steps; the published effect was stable after 2000.
        learning_rate: of AdamW.
        batch_size: pairs in a step.
        seed: of the batches.

    Raises:
        ValueError: the embeddings do not match.
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
    """Write a direction (d,) to a safetensors file."""
    from safetensors.torch import save_file

    save_file({_DIRECTION: direction.detach().cpu().contiguous()}, Path(path))
    apply_umask(Path(path))


@dataclass(frozen=True)
class EnsembleCredit:
    """Credit by an ensemble: each reward normalized within its group, all of them pooled, and normalized again.

    Preference rewards are defined up to a constant per prompt, so without the first normalization a minimum of
    them would mean nothing (arXiv 2312.09244). Of the weights only the signs count: a reward of negative weight is
    turned around. A sample that a reward could not score gets 0, and is left out of all statistics.

    Args:
        pool: How the rewards of non-zero weight become one score: ``worst_case``, ``median``, ``VariancePenalty``,
            ``DeviationPenalty``, ``NominalAndWorst`` or any function from (B, K) to (B,).
    """

    pool: AnyCallable = worst_case

    def __call__(self, outcome: RoundScores) -> Tensor:
        """Compute advantages (B,), as in ``genalign.algorithms.advantages.group_advantages``."""
        return group_advantages(self.pool(_normalized_members(outcome)), outcome.group)


@dataclass(frozen=True)
class UncertaintyDiscount:
    """``credit`` times exp(-strength U): a sample about which the rewards disagree teaches less.

    U is the standard deviation of a sample's rewards of non-zero weight, each normalized within its group and turned
    around if its weight is negative (Ctrl-U, arXiv 2410.11236). The credit shrinks and not the reward, because a
    negative reward would grow. Meant for rewards that ought to agree.

    Args:
        credit: The credit to discount, any ``genalign.algorithms.interfaces.Credit``.
        strength: How fast the credit fades with U; 0 leaves it as it is.
    """

    credit: AnyCallable
    strength: float = 1.0

    def __call__(self, outcome: RoundScores) -> Tensor:
        """Compute the discounted credit, (B,) or (B, S); 0 where a reward has no score."""
        disagreement = _normalized_members(outcome).std(1, correction=0)
        factor = torch.exp(-self.strength * disagreement).nan_to_num(0.0)
        credit: Tensor = self.credit(outcome)
        return credit * factor.to(credit.device).view(-1, *[1] * (credit.ndim - 1))


def _normalized_members(outcome: RoundScores) -> Tensor:
    """Normalize the K' rewards of non-zero weight in the groups, each times the sign of its weight, (B, K').

    NaN for a sample without all of them.
    """
    used = [column for column, weight in enumerate(outcome.weights) if weight]
    if len(used) < 2:
        raise ValueError(f"an ensemble needs 2 rewards or more of non-zero weight, not {len(used)}")
    scores = outcome.scores[:, used]
    missing = scores.isnan().any(1, keepdim=True)
    members = torch.where(missing, torch.nan, scores).unbind(1)
    normalized = torch.stack([group_advantages(member, outcome.group, clip=None) for member in members], 1)
    signs = torch.tensor([outcome.weights[column] for column in used], dtype=torch.float64).sign().float()
    return torch.where(missing, torch.nan, normalized * signs)


def _scores(
    rewards: Sequence[RewardFunction], samples: Tensor, prompts: Sequence[Prompt], constant: Sequence[int] = ()
) -> Tensor:
    """Score samples by all rewards as (B, K), float32 on the samples' device.

    Raises ValueError, by name, for a reward without a gradient where the samples have one. Those at the places
    ``constant`` need none.
    """
    if not rewards:
        raise ValueError("there are no rewards to combine: give at least one")
    columns = [reward(samples, prompts) for reward in rewards]
    for place, (reward, column) in enumerate(zip(rewards, columns, strict=True)):
        if place not in constant:
            require_gradient(reward, samples, column)
    return torch.stack([column.to(samples.device).float() for column in columns], 1)
