"""Rewards of one reward: bounded ones, which leave little to gain where samples are good enough, and residuals.

``PreferenceAsReward``, ``Calibrated`` and ``LogSigmoidCentered`` compare a score with the scores of samples of the same
prompt before training, which ``genalign reward references`` writes to a file, or ``reference_scores`` measures.

Bounded rewards need a credit in units of the score, ``genalign.algorithms.credit.LeaveOneOut``: one that divides by a
standard deviation stretches differences that have faded to full size again, so nothing is bounded. Training warns
of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.scoring.descriptions import describe
from genalign.scoring.reference_scores import ReferenceScores, ScoresByPrompt, scores_by_prompt
from genalign.scoring.score import require_gradient
from genalign.types import AnyCallable, Prompt, RewardFunction

_PERCENTILE_85 = 1.0364  # standard deviations of a normal distribution

References = str | Mapping[str, Sequence[float]] | Sequence[float]
"""Scores of samples before training: a file of them, those of each prompt by its text, or the same for all prompts."""


@dataclass(frozen=True)
class _AgainstReferences:
    """A reward that compares the scores of another with those of samples before training.

    Args:
        reward: The reward whose scores are compared.
        references: Scores of samples before training: the file that ``genalign reward references`` wrote, a list for
            the text of each prompt, or one list for all prompts.
    """

    reward: AnyCallable
    references: References
    saturates: ClassVar[bool] = True

    @property
    def reference_file(self) -> str | None:
        """The file of the reference scores; None where they are given as numbers."""
        return _file(self.references)

    def require_references(self, prompt: Prompt) -> None:
        """Raise ValueError where references that are given as numbers have none for ``prompt``."""
        if self.reference_file is None:
            self._references.of_prompt(prompt)

    @cached_property
    def _references(self) -> _ByPrompt:
        return _ByPrompt.of(self.reward, self.references)


@dataclass(frozen=True)
class PreferenceAsReward(_AgainstReferences):
    """The mean probability, in (0, 1), that a sample is preferred to samples of its prompt before training.

    This is PAR (arXiv 2502.18770): the mean of sigmoid(scale (score - reference)) over the references. The slope is
    largest at the references, and fades above and below them.

    Args:
        scale: The factor from scores to logits of a preference: 1 for PickScore and ImageReward, 100 for HPS and other
            cosines.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _require_scale(self.scale)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiable; NaN stays NaN. Raises ValueError for a prompt without references."""
        scores: Tensor = self.reward(samples, prompts)
        references = [self._references.of_prompt(prompt).to(scores.device) for prompt in prompts]
        preferred = [
            torch.sigmoid(self.scale * (score - own)).mean()
            for score, own in zip(scores.double(), references, strict=True)
        ]
        return torch.stack(preferred).float()


@dataclass(frozen=True)
class Calibrated(_AgainstReferences):
    """The fraction of samples of its prompt before training that a sample is better than, in [0, 1]; equal ones half.

    This is InfAlign's calibrated reward u (arXiv 2412.19792). No increasing function of the reward changes it, and it
    has no gradient.

    Args:
        tilt: A number t that turns u into what a search at inference time selects by: exp(t (u - 1)) in (0, 1] for
            t > 0, for the best of n, and -exp(t u) for t < 0, for the worst of n; null leaves u.
    """

    tilt: float | None = None

    def __post_init__(self) -> None:
        if self.tilt == 0:
            raise ValueError("a tilt of 0 makes all samples equal: take null for the fraction itself, or 10")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,); NaN stays NaN. Raises ValueError for a prompt without references."""
        scores: Tensor = self.reward(samples, prompts).detach()
        values = scores.double()
        references = [self._references.of_prompt(prompt).to(scores.device) for prompt in prompts]
        pairs = zip(values, references, strict=True)
        fraction = torch.stack([((own < score).double() + 0.5 * (own == score)).mean() for score, own in pairs])
        if self.tilt is not None:
            t = self.tilt
            fraction = torch.exp(t * (fraction - 1)) if t > 0 else -torch.exp(t * fraction)
        return torch.where(values.isnan(), math.nan, fraction).float()


@dataclass(frozen=True)
class LogSigmoidCentered:
    """Log sigmoid(scale (score - reference)), at most 0: above the reference there is little left to gain.

    The sum over rewards is the log-probability that a sample is good by all of them (arXiv 2402.00742).

    Args:
        reward: The reward whose scores are compared with the reference.
        reference: One level of the score for all prompts, a level for the text of each, as ``reference_levels``
            measures them, or a file of ``genalign reward references``, of whose scores the levels are the 85th
            percentiles of normal distributions.
        scale: The factor from scores to logits of a preference: 1 for PickScore and ImageReward, 100 for HPS and other
            cosines.
    """

    reward: AnyCallable
    reference: float | str | Mapping[str, float]
    scale: float = 1.0
    saturates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_scale(self.scale)

    @property
    def reference_file(self) -> str | None:
        """The file of the reference scores."""
        return _file(self.reference)

    def require_references(self, prompt: Prompt) -> None:
        """Raise ValueError where levels that are given by prompt have none for ``prompt``."""
        if isinstance(self.reference, Mapping):
            self._level(prompt)

    @cached_property
    def _levels(self) -> Mapping[str, float]:
        assert not isinstance(self.reference, float | int), "one level needs no prompt"
        if isinstance(self.reference, str):
            return levels_of(_ByPrompt.of(self.reward, self.reference).scores)
        return self.reference

    def _level(self, prompt: Prompt) -> float:
        if prompt.text not in self._levels:
            raise ValueError(f"the prompt {prompt.text!r} has no reference level: score base samples of it first")
        return self._levels[prompt.text]

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiable. Raises ValueError for a prompt without a reference level."""
        scores: Tensor = self.reward(samples, prompts)
        if isinstance(self.reference, float | int):
            return F.logsigmoid(self.scale * (scores - self.reference))
        levels = scores.new_tensor([self._level(prompt) for prompt in prompts])
        return F.logsigmoid(self.scale * (scores - levels))


@dataclass(frozen=True)
class Ceiling:
    """The score up to ``limit``, beyond which a sample gains nothing.

    Args:
        reward: The reward to bound.
        limit: The highest score that counts, in units of the reward.
    """

    reward: AnyCallable
    limit: float
    saturates: ClassVar[bool] = True

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores: Tensor = self.reward(samples, prompts)
        return scores.clamp(max=self.limit)


@dataclass(frozen=True)
class Residualized:
    """Score - slope (nuisance - mean): the score without what a nuisance explains of it before training.

    Slope and mean are fixed, so a score does not depend on its batch: given, or regressed on reference samples by
    ``measured``. ``genalign.algorithms.multi_reward_credit.Decorrelated`` regresses the credit of every round instead.

    Args:
        reward: The reward to correct.
        nuisance: Any function of a reward's form, such as a measure of size or saturation.
        slope: By how much the score rises with one unit of the nuisance.
        mean: The mean of the nuisance over reference samples.
    """

    reward: AnyCallable
    nuisance: AnyCallable
    slope: float
    mean: float

    @classmethod
    def measured(
        cls, reward: RewardFunction, nuisance: RewardFunction, samples: Tensor, prompts: Sequence[Prompt]
    ) -> Residualized:
        """Regress the scores of samples before training on a nuisance.

        Samples without both are left out. Raises ValueError for fewer than 2 samples, or a nuisance that is constant.
        """
        with torch.no_grad():
            pairs = [function(samples, prompts).double().cpu() for function in (reward, nuisance)]
        scored = pairs[0].isfinite() & pairs[1].isfinite()
        scores, values = (part[scored] for part in pairs)
        if len(scores) < 2:
            raise ValueError(f"a slope needs scores of at least 2 samples, got {len(scores)}: measure on more")
        deviation = values - values.mean()
        if float(values.std(correction=0)) <= 1e-7 * float(values.abs().max()):
            raise ValueError("the nuisance is the same for all samples: it explains nothing; leave it out")
        slope = float((deviation * (scores - scores.mean())).sum() / deviation.square().sum())
        return cls(reward, nuisance, slope, float(values.mean()))

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,); NaN where either has no score. Raises ValueError if only one has a gradient."""
        scores, nuisance = (
            require_gradient(function, samples, function(samples, prompts)) for function in (self.reward, self.nuisance)
        )
        return scores - self.slope * (nuisance.to(scores) - self.mean)


@torch.no_grad()
def reference_scores(
    reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt]
) -> dict[str, tuple[float, ...]]:
    """Score samples (B, ...) of the model before training, by the text of their prompt.

    Raises ValueError where no sample of a prompt could be scored.
    """
    return scores_by_prompt(reward(samples, prompts), prompts)


def reference_levels(
    reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt], deviations: float = _PERCENTILE_85
) -> dict[str, float]:
    """Measure the level of each prompt's text: mean score plus ``deviations`` standard deviations (ddof 0).

    Args:
        reward: the reward.
        samples: samples (B, ...) of the model before training.
        prompts: their prompts.
        deviations: 1.0364 is the 85th percentile of a normal distribution.

    Raises:
        ValueError: no sample of a prompt could be scored.
    """
    return levels_of(reference_scores(reward, samples, prompts), deviations)


def levels_of(scores: ScoresByPrompt, deviations: float = _PERCENTILE_85) -> dict[str, float]:
    """Return the mean plus ``deviations`` standard deviations (ddof 0) of the scores of each prompt, by its text."""
    values = {text: torch.tensor(own, dtype=torch.float64) for text, own in scores.items()}
    return {text: float(own.mean() + deviations * own.std(correction=0)) for text, own in values.items()}


@dataclass(frozen=True)
class _ByPrompt:
    """References by the text of a prompt, or the same for all; ``source`` names them in messages."""

    scores: ScoresByPrompt
    shared: Tensor | None
    source: str

    @classmethod
    def of(cls, reward: AnyCallable, references: References) -> _ByPrompt:
        """Read or convert references of a reward. Raises ValueError for the file of another reward, or for none."""
        if isinstance(references, str):
            stored = ReferenceScores.load(references)
            source = f"{references}, the scores of the prompt set {stored.prompts!r}"
            return cls(stored.by(describe(reward), references), None, source)
        if isinstance(references, Mapping):
            return cls(references, None, "the references")
        if not len(references):
            raise ValueError("references must hold at least one score of a sample before training")
        return cls({}, torch.tensor(references, dtype=torch.float64), "")

    def of_prompt(self, prompt: Prompt) -> Tensor:
        """Return the references (M,) of a prompt, in float64. Raises ValueError where it has none."""
        if self.shared is not None:
            return self.shared
        if not self.scores.get(prompt.text):
            raise ValueError(f"the prompt {prompt.text!r} is not in {self.source}: score base samples of it first")
        return torch.tensor(self.scores[prompt.text], dtype=torch.float64)


def _file(references: object) -> str | None:
    return references if isinstance(references, str) else None


def _require_scale(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}: it turns scores into logits of a preference")
