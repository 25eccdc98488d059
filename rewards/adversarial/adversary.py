"""A scorer in training against the generator, and the frozen snapshot of it that scores."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from genalign.runtime.files import load_optimizer_tensors, optimizer_tensors, with_prefix, without_prefix
from genalign.types import Prompt
from rewards.adversarial.losses import LossName, adversarial_loss, pair_accuracy
from rewards.adversarial.replay import Batch, Replay
from rewards.adversarial.rules import Standing, UpdateRule
from rewards.adversarial.weighting import Weighting, single
from rewards.backbones.reference_images import References

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learning:
    """How a reward is trained: Adam(``learning_rate``, betas (0.5, 0.999)), in float32.

    An update makes ``steps_per_update`` optimiser steps, each on ``batch_size`` pairs of a reference and a generated
    sample; the share ``fresh`` of the generated ones is of this round, the others are of earlier rounds, of which the
    last ``replay`` samples are kept per process (0 keeps none). ``batch_size`` also bounds every forward pass.
    """

    loss: LossName = "hinge"
    learning_rate: float = 1e-4
    steps_per_update: int = 10
    batch_size: int = 64
    replay: int = 1024
    fresh: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in ("hinge", "bce", "bt_pairwise"):
            raise ValueError(f'loss must be "hinge", "bce" or "bt_pairwise", not {self.loss!r}')
        if self.steps_per_update < 1 or self.batch_size < 1 or self.replay < 0 or not self.learning_rate > 0:
            raise ValueError(
                "steps_per_update and batch_size must be at least 1, replay at least 0 and learning_rate positive, not"
                f" {self.steps_per_update}, {self.batch_size}, {self.replay} and {self.learning_rate}"
            )
        if not 0 < self.fresh <= 1:
            raise ValueError(f"fresh is the share of this round's samples in (0, 1], not {self.fresh}")


@dataclass(frozen=True)
class Snapshot:
    """The weights that a round is scored by; ``version`` counts how often they were trained."""

    version: int
    weights: Mapping[str, Tensor]


class Adversary:
    """A ``TrainableReward``: a scorer in training, and the frozen snapshot of it that scores.

    ``scorer`` and its starting weights must be the same on every rank. In training by several processes each is given
    all samples of a round and draws the same, so that they learn what one would; where ``torch.distributed`` is
    initialised, gradients and readings are averaged over ranks as well, which keeps them in step where kernels do not
    give the same sums twice. Trained parameters are made float32, the scorer stays in evaluation mode (no dropout), and
    it follows the samples' device. Logits are multiplied by ``scale`` in the loss, not in the score; ``weighting``
    makes one score of several, and None takes the only one.
    """

    def __init__(
        self,
        scorer: nn.Module,
        references: References,
        update_rule: UpdateRule,
        learning: Learning,
        weighting: Weighting | None = None,
        scale: float = 1.0,
    ) -> None:
        self.scorer, self.references, self.update_rule, self.learning = scorer.eval(), references, update_rule, learning
        self.weighting, self.scale = weighting or single, scale
        self.trained = {name: p for name, p in scorer.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("no parameter of the scorer requires a gradient: there is nothing to train")
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=learning.learning_rate, betas=(0.5, 0.999))
        self.replay = Replay(learning.replay)
        self.snapshot = self._copied(0)
        self._rounds, self._training = 0, True

    @property
    def version(self) -> int:
        """The snapshot's number: equal versions give equal scores."""
        return self.snapshot.version

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, by the snapshot; NaN where a sample has NaN."""
        return self.score(samples, prompts)

    def score(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The weighted logits (B,) of the snapshot, differentiable in the samples."""
        batch = Batch(samples, tuple(prompts))
        self._follow(samples.device)
        logits = torch.cat([self._logits(part, self.snapshot.weights) for part in self._parts(batch)])
        return logits @ self._weights(logits)

    def update(self, samples: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Train where the rule says so, remember the samples, and take a new snapshot if the weights changed.

        The readings are of the time before training, on this round's samples, each against one reference: "accuracy",
        "generated" and "reference" (mean scores), "gap", "loss", "updated", "saturated" (1 where every margin of the
        hinge is satisfied, so that there is nothing to learn), "replay" (samples remembered) and "version" after it.
        Raises ValueError where no sample is finite, or a prompt has no reference.
        """
        batch = Batch(samples.detach(), tuple(prompts)).finite()
        self._follow(samples.device)
        generator = _generator(self.learning.seed, 0, self._rounds)
        standing = self._standing(batch, generator)
        updated = self.update_rule(standing)
        if updated:
            for _ in range(self.learning.steps_per_update):
                self._step(self._mixed(batch, generator), generator)
            self.snapshot = self._copied(self.version + 1)
        self.replay.push(batch)
        self._rounds, self._training = self._rounds + 1, updated
        return self._readings(standing, updated)

    def tensors(self) -> dict[str, Tensor]:
        """Trained weights, snapshot, optimiser slots, replay and counters (seeds derive from them)."""
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
        """Put back what ``tensors()`` gave. Raises ValueError for the tensors of another scorer."""
        weights = without_prefix("scorer.", tensors)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if shapes != {name: parameter.shape for name, parameter in self.trained.items()}:
            raise ValueError("these tensors are of another reward: load into one with the same scorer, head and blocks")
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
        version, self._rounds, training = tensors["counters"].tolist()
        self._training = bool(training)
        self.snapshot = Snapshot(version, _copies(without_prefix("snapshot.", tensors), self._device()))
        load_optimizer_tensors(self.optimizer, _copies(without_prefix("optimizer.", tensors)))
        self.replay.load_tensors(without_prefix("replay.", tensors))

    def _logits(self, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, m) in float32 by ``weights``."""
        samples = batch.samples.to(self._device())
        logits: Tensor = functional_call(self.scorer, dict(weights), (samples, batch.prompts)).float()
        if logits.ndim not in (1, 2) or len(logits) != len(batch):
            raise ValueError(f"the scorer must give (B,) or (B, m) for {len(batch)} samples, not {tuple(logits.shape)}")
        return logits[:, None] if logits.ndim == 1 else logits

    def _parts(self, batch: Batch) -> list[Batch]:
        size = self.learning.batch_size
        return [batch.rows(range(i, min(i + size, len(batch)))) for i in range(0, len(batch), size)]

    def _weights(self, logits: Tensor) -> Tensor:
        generator = _generator(self.learning.seed, "snapshot", self.version)
        return self.weighting(logits.shape[1], generator).to(logits.device)

    def _pairs(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits (B, m) of references of the same prompts, and of the generated samples, by the current weights."""
        real = Batch(self.references.draw(batch.prompts, generator), batch.prompts)
        return self._logits(real, self.trained), self._logits(batch, self.trained)

    @torch.no_grad()
    def _standing(self, batch: Batch, generator: torch.Generator) -> Standing:
        sums = torch.zeros(5, dtype=torch.float64, device=self._device())
        for part in self._parts(batch):
            real, fake = self._pairs(part, generator)
            weights = self._weights(real)
            right = pair_accuracy(self.learning.loss, real @ weights, fake @ weights)
            terms = (fake @ weights, real @ weights, right, self._losses(real, fake), torch.ones_like(right))
            sums += torch.stack(terms, dim=1).double().sum(0)
        _average_over_ranks([sums])
        generated, reference, accuracy, loss = (sums[:4] / sums[4]).tolist()
        return Standing(self._rounds, generated, reference, accuracy, loss, self._training)

    def _losses(self, real: Tensor, fake: Tensor) -> Tensor:
        """The weighted loss (B,) of each pair."""
        return adversarial_loss(self.learning.loss, self.scale * real, self.scale * fake) @ self._weights(real)

    @torch.enable_grad()
    def _step(self, batch: Batch, generator: torch.Generator) -> None:
        """One optimiser step."""
        parameters = list(self.trained.values())
        loss = self._losses(*self._pairs(batch, generator)).mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        _average_over_ranks(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _mixed(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Fresh samples and remembered ones, in random order each."""
        count = min(self.learning.batch_size, len(batch))
        old = self.replay.draw(min(count - 1, round((1 - self.learning.fresh) * count)), generator)
        fresh = torch.randperm(len(batch), generator=generator)[: count - (len(old) if old else 0)]
        drawn = batch.rows(fresh.tolist())
        return drawn.joined(Batch(old.samples.to(drawn.samples), old.prompts)) if old else drawn

    def _copied(self, version: int) -> Snapshot:
        return Snapshot(version, _copies(self.trained))

    def _device(self) -> torch.device:
        return next(iter(self.trained.values())).device

    def _follow(self, device: torch.device) -> None:
        """Move to where the samples are."""
        if device == self._device():
            return
        self.scorer.to(device)
        self.snapshot = Snapshot(self.version, _copies(self.snapshot.weights, device))
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # puts its slots where the parameters are

    def _readings(self, standing: Standing, updated: bool) -> dict[str, float]:
        saturated = self.learning.loss == "hinge" and standing.loss == 0
        if saturated:
            logger.warning(
                "the discriminator satisfies every margin: there is nothing for it to learn, and samples of equal score"
                " are skipped; lower learning_rate or steps_per_update, or train it within AccuracyBand()"
            )
        return {
            "accuracy": standing.accuracy,
            "generated": standing.generated,
            "reference": standing.reference,
            "gap": standing.gap,
            "loss": standing.loss,
            "updated": float(updated),
            "saturated": float(saturated),
            "replay": float(len(self.replay)),
            "version": float(self.version),
        }


def _copies(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """The same values in memory of their own, on ``device`` or where they are."""
    return {name: tensor.detach().to(device or tensor.device, copy=True) for name, tensor in tensors.items()}


def _generator(*parts: int | str) -> torch.Generator:
    """Random numbers that depend on ``parts`` alone, so that a resumed run draws the same."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, parts))).getrandbits(63))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place."""
    if _is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
