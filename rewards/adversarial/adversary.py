"""A discriminator that is trained against the generator, and the frozen snapshot of it that scores.

Its losses are those of ``genalign.reward_learning.adversarial_losses``; the weighting of several logits follows below.
"""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from genalign.reward_learning.adversarial_losses import (
    LossName,
    adversarial_loss,
    between_pairs,
    gradient_norms,
    pair_accuracy,
)
from genalign.reward_learning.fitting import FitSettings, Fitter
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.state import load_optimizer_tensors, optimizer_tensors
from genalign.types import Prompt
from rewards.adversarial.replay_buffer import ReplayBuffer, SampleBatch, sum_over_ranks
from rewards.adversarial.update_rules import DiscriminatorStatus, UpdateRule
from rewards.backbones.reference_images import References

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiscriminatorSettings:
    """How a reward is trained: by Adam with betas (0.5, 0.999), in float32.

    The ranks of a run share the pairs of a step.

    The gradient penalty is (norm - ``gradient_target``)^2 of the gradient of the scaled logit at a random point between
    the reference and the sample of each pair (WGAN-GP, arXiv 1704.00028, eq. 3; of adversarially learned rewards, arXiv
    2006.16785). The gradient is for the features that the logit is read from, where the scorer is a head on frozen ones
    (``FeatureScorer``), and for the sample of any other scorer, which must be differentiable.

    Args:
        loss: The loss of a pair of a reference and a generated sample: "hinge" (Adv-GRPO, eqs. 12-14), or
            "bt_pairwise", Bradley and Terry's, see ``genalign.reward_learning.adversarial_losses``.
        learning_rate: The learning rate of Adam.
        steps_per_update: The number of optimizer steps in a round in which the reward is trained.
        batch_size: The number of pairs in an optimizer step, and the largest number of samples in a forward pass.
        replay: The number of generated samples of earlier rounds that are stored, the latest ones; 0 stores none.
        fresh: The fraction of a step's generated samples, in (0, 1], that are from this round; the others are replayed.
        seed: The seed of all draws: of pairs, of patches and of the weights of a default head.
        gradient_penalty: The weight of the penalty, which bounds how steep the reward is; 0 for none, 10 in WGAN-GP.
        gradient_target: The norm of the gradient for which the penalty is 0.
    """

    loss: LossName = "hinge"
    learning_rate: float = 1e-4
    steps_per_update: int = 10
    batch_size: int = 64
    replay: int = 1024
    fresh: float = 0.5
    seed: int = 0
    gradient_penalty: float = 0.0
    gradient_target: float = 1.0

    def __post_init__(self) -> None:
        if self.gradient_penalty < 0 or self.gradient_target < 0:
            penalty = f"{self.gradient_penalty} and {self.gradient_target}"
            raise ValueError(f"gradient_penalty and gradient_target must not be negative, but are {penalty}")
        if self.loss not in ("hinge", "bt_pairwise"):
            raise ValueError(f'loss must be "hinge" or "bt_pairwise", not {self.loss!r}')
        if self.steps_per_update < 1 or self.batch_size < 1 or self.replay < 0 or not self.learning_rate > 0:
            raise ValueError(
                f"steps_per_update and batch_size must be at least 1, replay at least 0, learning_rate positive: {self}"
            )
        if not 0 < self.fresh <= 1:
            raise ValueError(f"fresh is the fraction of this round's samples in (0, 1], not {self.fresh}")


@dataclass(frozen=True)
class ScoringWeights:
    """The weights that score a round; ``version`` counts the updates that changed them."""

    version: int
    weights: Mapping[str, Tensor]


class FeatureScorer(nn.Module, ABC):
    """A scorer that reads each of its logits from features of a frozen network."""

    @abstractmethod
    def features(self, samples: Tensor) -> Tensor:
        """Compute features (B, m, d) of samples (B, ...), differentiably where these require a gradient."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Compute logits (B, m) from features (B, m, d)."""

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compute logits (B, m) of samples; the prompts are ignored."""
        return self.logits(self.features(samples))


class Adversary:
    """A ``TrainableReward``: a scorer in training, and the frozen snapshot of it that scores.

    ``scorer`` and its initial weights must be the same on every rank. Every rank has its own samples of a round, draws
    the same random numbers, and computes its own part of the mean over the pairs of a step; where ``torch.distributed``
    is initialized, gradients and metrics are summed over ranks, so all learn what one rank with all samples would.
    Trained parameters are cast to float32, the scorer stays in evaluation mode (no dropout), and it follows the
    samples' device.

    Args:
        scorer: any module of (samples, prompts) to logits (B,) or (B, m).
        references: samples to tell generated ones from, by prompt or as a pool.
        update_rule: in which rounds the scorer is trained.
        learning: loss, optimizer and batches.
        weighting: weights of several logits in the score; None takes a single one.
        scale: factor of the logits in the loss, not in the score.

    Raises:
        ValueError: no parameter of the scorer requires a gradient.
    """

    def __init__(
        self,
        scorer: nn.Module,
        references: References,
        update_rule: UpdateRule,
        learning: DiscriminatorSettings,
        weighting: Weighting | None = None,
        scale: float = 1.0,
    ) -> None:
        self.scorer, self.references, self.update_rule, self.learning = scorer.eval(), references, update_rule, learning
        self.weighting, self.scale = weighting or single, scale
        self.trained = {name: p for name, p in scorer.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("no parameter of the scorer requires a gradient: there is nothing to train")
        # AdamW without a decay is Adam
        settings = FitSettings(learning.learning_rate, weight_decay=0.0, betas=(0.5, 0.999), clip=None)
        self.fitter = Fitter(self.trained, settings)
        self.optimizer = self.fitter.optimizer
        self.replay = ReplayBuffer(learning.replay)
        self.snapshot = ScoringWeights(0, _copies(self.trained))
        self._rounds, self._training = 0, True

    def require_references(self, prompt: Prompt) -> None:
        """Raise ValueError where there are no references for ``prompt``."""
        self.references.rows(prompt)

    @property
    def version(self) -> int:
        """The version of the snapshot: equal versions give equal scores."""
        return self.snapshot.version

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples by the snapshot's weighted logits (B,), float32, differentiable; NaN where one has NaN."""
        batch = SampleBatch(samples, tuple(prompts))
        self._follow(samples.device)
        weights, parts = dict(self.snapshot.weights), list[Tensor]()
        for part in self._parts(batch):
            scored = functional_call(self.scorer, weights, (part.samples.to(self._device()), part.own_prompts))
            parts.append(_as_matrix(scored, len(part.numbers)))
        logits = torch.cat(parts)
        return logits @ self._weights(logits)

    def update(self, samples: Tensor, prompts: Sequence[Prompt], rows: Sequence[int] | None = None) -> dict[str, float]:
        """Train if the rule says so, store the samples, and take a new snapshot if the weights changed.

        ``prompts`` are those of the samples of all ranks; ``rows`` are the numbers among them of ``samples``, which
        this rank has, None for all. The metrics are measured before training, on this round's samples, each against one
        reference: "accuracy", "generated" and "reference" (mean scores), "gap", "loss", "updated", "saturated" (1 where
        every margin of the hinge is satisfied, so there is nothing to learn), "replay" (samples stored) and
        "version" after it; with a gradient penalty also "gradient_norm", the mean of the norms that it bounds.
        Raises ValueError where no sample is finite, or a prompt has no reference.
        """
        batch = SampleBatch(samples.detach(), tuple(prompts), None if rows is None else tuple(rows)).finite()
        self._follow(samples.device)
        generator = _generator(self.learning.seed, 0, self._rounds)
        status = self._status(batch, generator)
        updated = self.update_rule(status)
        if updated:
            for _ in range(self.learning.steps_per_update):
                self._step(self._mixed_with_replay(batch, generator), generator)
            self.snapshot = ScoringWeights(self.version + 1, _copies(self.trained))
        self.replay.push(batch)
        self._rounds, self._training = self._rounds + 1, updated
        saturated = self.learning.loss == "hinge" and status.loss == 0
        if saturated:
            logger.warning(
                "the discriminator satisfies every margin: there is nothing for it to learn, and samples of equal score"
                " are skipped; lower learning_rate or steps_per_update, or train it within AccuracyBand()"
            )
        measured = {name: getattr(status, name) for name in ("accuracy", "generated", "reference", "gap", "loss")}
        counts = {"updated": updated, "saturated": saturated, "replay": len(self.replay), "version": self.version}
        steepness = {"gradient_norm": status.gradient_norm} if status.gradient_norm is not None else {}
        return measured | {name: float(value) for name, value in counts.items()} | steepness

    def tensors(self) -> dict[str, Tensor]:
        """Return trained weights, snapshot, optimizer state, replay, and the counters that seeds derive from.

        Every rank must call this; only the main rank gets the replayed samples.
        """
        counters = torch.tensor([self.version, self._rounds, int(self._training)])
        return (
            {"counters": counters}
            | with_prefix("scorer.", _copies(self.trained))
            | with_prefix("snapshot.", _copies(self.snapshot.weights))
            | with_prefix("optimizer.", _copies(optimizer_tensors(self.optimizer)))
            | with_prefix("replay.", self.replay.tensors())
        )

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors()`` returned. Raises ValueError for the tensors of another scorer."""
        weights = without_prefix("scorer.", tensors)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if shapes != {name: parameter.shape for name, parameter in self.trained.items()}:
            raise ValueError("this checkpoint is of another adversarial reward: use the same scorer, head and blocks")
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
        version, self._rounds, training = tensors["counters"].tolist()
        self._training = bool(training)
        self.snapshot = ScoringWeights(version, _copies(without_prefix("snapshot.", tensors), self._device()))
        load_optimizer_tensors(self.optimizer, _copies(without_prefix("optimizer.", tensors)))
        self.replay.load_tensors(without_prefix("replay.", tensors))

    def _inputs(self, batch: SampleBatch) -> Tensor:
        """Return what the trained part reads of this rank's samples: features (b, m, d), or else the samples."""
        samples = batch.samples.to(self._device())
        return self.scorer.features(samples) if isinstance(self.scorer, FeatureScorer) else samples

    def _logits(self, inputs: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compute logits (b, m) of inputs by the trained weights."""
        scored = self.scorer.logits(inputs) if isinstance(self.scorer, FeatureScorer) else self.scorer(inputs, prompts)
        return _as_matrix(scored, len(inputs))

    def _parts(self, batch: SampleBatch) -> list[SampleBatch]:
        size = self.learning.batch_size
        return [batch.rows(range(i, min(i + size, len(batch)))) for i in range(0, len(batch), size)]

    def _weights(self, logits: Tensor) -> Tensor:
        generator = _generator(self.learning.seed, "snapshot", self.version)
        return self.weighting(logits.shape[1], generator).to(logits.device)

    def _pairs(self, batch: SampleBatch, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """Load references of the same prompts; return inputs of them and of this rank's samples.

        None where this rank has no sample of the batch.
        """
        numbers = self.references.choose(batch.prompts, generator)  # of all ranks
        if not batch.numbers:
            return None
        references = self.references.images.load([numbers[number] for number in batch.numbers])
        return self._inputs(SampleBatch(references, batch.prompts, batch.numbers)), self._inputs(batch)

    @torch.no_grad()
    def _status(self, batch: SampleBatch, generator: torch.Generator) -> DiscriminatorStatus:
        penalized = self.learning.gradient_penalty > 0
        sums = torch.zeros(6 if penalized else 5, dtype=torch.float64, device=self._device())
        for part in self._parts(batch):
            pairs, shares = self._pairs(part, generator), self._shares(part, generator)
            if pairs is None:
                continue
            real, fake = (self._logits(inputs, part.own_prompts) for inputs in pairs)
            weights = self._weights(real)
            right = pair_accuracy(self.learning.loss, real @ weights, fake @ weights)
            terms = [fake @ weights, real @ weights, right, self._losses(real, fake), torch.ones_like(right)]
            if shares is not None:
                norms, shared = self._gradient_norms(*pairs, shares, part.own_prompts)
                terms.append((norms @ shared / shared.sum()).detach())
            sums += torch.stack(terms, dim=1).double().sum(0)
        sum_over_ranks([sums])
        count = sums[4]
        generated, reference, accuracy, loss = (sums[:4] / count).tolist()
        norm = float(sums[5] / count) if penalized else None
        return DiscriminatorStatus(self._rounds, generated, reference, accuracy, loss, self._training, norm)

    def _shares(self, batch: SampleBatch, generator: torch.Generator) -> Tensor | None:
        """Draw where between reference and sample the gradient of each pair is penalized; None without a penalty.

        They are drawn for the pairs of all ranks, and returned (b,) for this one's.
        """
        if not self.learning.gradient_penalty:
            return None
        return torch.rand(len(batch), generator=generator)[list(batch.numbers)]

    def _gradient_norms(
        self, real: Tensor, fake: Tensor, shares: Tensor, prompts: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor]:
        """Compute norms (b, m) of the gradients of scaled logits between pairs of inputs, and their weights (m,).

        Of features there is a gradient of each logit, and of samples one of the weighted logit, m = 1.
        """
        between = between_pairs(real, fake, shares)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            logits = self.scale * self._logits(between, prompts)
            weights = self._weights(logits)
            if isinstance(self.scorer, FeatureScorer):
                return gradient_norms(logits, between), weights
            return gradient_norms(logits @ weights, between)[:, None], torch.ones_like(weights[:1])

    def _losses(self, real: Tensor, fake: Tensor) -> Tensor:
        """Compute the weighted loss (B,) of each pair."""
        return adversarial_loss(self.learning.loss, self.scale * real, self.scale * fake) @ self._weights(real)

    @torch.enable_grad()
    def _step(self, batch: SampleBatch, generator: torch.Generator) -> None:
        """Take one optimizer step on pairs of references and the samples of ``batch``, of all ranks."""
        pairs, shares = self._pairs(batch, generator), self._shares(batch, generator)
        if pairs is None:
            gradients = [torch.zeros_like(parameter) for parameter in self.trained.values()]
        else:
            real, fake = (self._logits(inputs, batch.own_prompts) for inputs in pairs)
            losses = self._losses(real, fake)
            if shares is not None:
                norms, weights = self._gradient_norms(*pairs, shares, batch.own_prompts)
                penalties = (norms - self.learning.gradient_target).square() @ weights
                losses = losses + self.learning.gradient_penalty * penalties
            gradients = self.fitter.gradients(losses.sum() / len(batch))
        sum_over_ranks(gradients)
        self.fitter.apply(gradients)

    def _mixed_with_replay(self, batch: SampleBatch, generator: torch.Generator) -> SampleBatch:
        """Draw samples of this round and replayed ones, each in random order."""
        count = min(self.learning.batch_size, len(batch))
        old = self.replay.draw(min(count - 1, round((1 - self.learning.fresh) * count)), generator)
        fresh = torch.randperm(len(batch), generator=generator)[: count - (len(old) if old else 0)]
        drawn = batch.rows(fresh.tolist())
        return drawn.joined(replace(old, samples=old.samples.to(drawn.samples))) if old else drawn

    def _device(self) -> torch.device:
        return next(iter(self.trained.values())).device

    def _follow(self, device: torch.device) -> None:
        """Move scorer and snapshot to the samples' device; the optimizer's state follows at its next step."""
        if device == self._device():
            return
        self.scorer.to(device)
        self.snapshot = ScoringWeights(self.version, _copies(self.snapshot.weights, device))


def _copies(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """Copy the tensors, to ``device`` or on their own."""
    return {name: tensor.detach().to(device or tensor.device, copy=True) for name, tensor in tensors.items()}


def _as_matrix(logits: Tensor, count: int) -> Tensor:
    """Return logits (b, m) in float32 for ``count`` samples. Raises ValueError for another shape."""
    if logits.ndim not in (1, 2) or len(logits) != count:
        raise ValueError(f"the scorer must give (B,) or (B, m) for {count} samples, not {tuple(logits.shape)}")
    logits = logits.float()
    return logits[:, None] if logits.ndim == 1 else logits


def _generator(*parts: int | str) -> torch.Generator:
    """Seed a generator by ``parts`` alone, so a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, parts))).getrandbits(63))


class Weighting(Protocol):
    """Weights of the m logits of a sample in its score and its loss."""

    def __call__(self, width: int, generator: torch.Generator) -> Tensor:
        """Return weights (width,), 0 for an unused logit; ``generator`` is equal in all calls of one snapshot."""


def single(width: int, generator: torch.Generator) -> Tensor:
    """Take the only logit as the score. Raises ValueError for more than one."""
    if width != 1:
        raise ValueError(f"the scorer gives {width} logits per sample: return (B,), or pass a weighting")
    return torch.ones(1)


@dataclass(frozen=True)
class PatchWeights:
    """The logit of the whole image, and the mean of ``n_patches`` patch logits (Adv-GRPO, eqs. 9-14, appendix A).

    New patches are drawn for each snapshot, the same for its scores and its training and on every rank. Both the
    score and the loss use the weights.

    Args:
        global_weight: The weight of the image's logit, 0 or more.
        local_weight: The weight of the mean of the patch logits, 0 or more; 0 leaves patches out.
        n_patches: The number of patches that are drawn, at most those of the features.
    """

    global_weight: float = 0.7
    local_weight: float = 0.3
    n_patches: int = 64

    def __post_init__(self) -> None:
        if min(self.global_weight, self.local_weight) < 0 or self.global_weight + self.local_weight <= 0:
            weights = f"{self.global_weight} and {self.local_weight}"
            raise ValueError(f"global_weight and local_weight must not be negative, nor both 0, but are {weights}")
        if self.n_patches < 1:
            raise ValueError(f"n_patches must be at least 1, not {self.n_patches}; local_weight=0 leaves patches out")

    def __call__(self, width: int, generator: torch.Generator) -> Tensor:
        """Weigh 1 + n logits, the image's first. Raises ValueError for fewer patches than ``n_patches``."""
        weights = torch.zeros(width)
        weights[0] = self.global_weight
        if self.local_weight:
            if self.n_patches > width - 1:
                raise ValueError(f"n_patches is {self.n_patches}, but the features have {width - 1} patches: lower it")
            patches = torch.randperm(width - 1, generator=generator)[: self.n_patches]
            weights[1 + patches] = self.local_weight / self.n_patches
        return weights
