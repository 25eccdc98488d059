"""Rewards that are trained against the generator (Adv-GRPO, arXiv 2511.20256).

A scorer is any ``nn.Module`` with ``forward(images, prompts)`` giving logits (B,) or (B, m); ``Adversary`` trains those
of its parameters that require a gradient to tell references from generated samples, and scores by a frozen copy.
No gradient of the generator flows through it during training: samples arrive detached.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from genalign.checkpoints import load_optimizer_tensors, optimizer_tensors, with_prefix, without_prefix
from genalign.types import FeatureFunction, Prompt
from rewards.clip import load_clip
from rewards.features import PatchFeatures
from rewards.references import References
from rewards.towers import Features, cosine

logger = logging.getLogger(__name__)
LossName = Literal["hinge", "bce", "bt_pairwise"]


def adversarial_loss(name: LossName, real: Tensor, fake: Tensor) -> Tensor:
    """The loss of each pair of logits, elementwise, for ``real`` and ``fake`` of one shape.

    "hinge": relu(1 - real) + relu(1 + fake) (Adv-GRPO, eqs. 12-14). "bce": -log sigmoid(real) - log(1 -
    sigmoid(fake)) (eq. 6). "bt_pairwise": -log sigmoid(real - fake), Bradley-Terry on pairs of one prompt.
    """
    _require_pairs(real, fake)
    match name:
        case "hinge":
            return F.relu(1 - real) + F.relu(1 + fake)
        case "bce":
            return F.softplus(-real) + F.softplus(fake)
        case "bt_pairwise":
            return F.softplus(fake - real)


def pair_accuracy(name: LossName, real: Tensor, fake: Tensor) -> Tensor:
    """How right the scores of each pair are, elementwise in [0, 1]; a tie is wrong.

    For "bt_pairwise" whether real > fake, for the others the mean of real > 0 and fake < 0.
    """
    _require_pairs(real, fake)
    if name == "bt_pairwise":
        return (real > fake).float()
    return ((real > 0).float() + (fake < 0).float()) / 2


def _require_pairs(real: Tensor, fake: Tensor) -> None:
    if real.shape != fake.shape:
        raise ValueError(f"logits come in pairs: real is {tuple(real.shape)}, fake is {tuple(fake.shape)}")


@dataclass(frozen=True)
class Standing:
    """How the reward does against the generator before an update, over all ranks.

    ``generated`` and ``reference`` are mean scores, ``round`` counts updates so far, and ``training`` tells whether the
    last one changed the weights (True at first).
    """

    round: int
    generated: float
    reference: float
    accuracy: float
    loss: float
    training: bool

    @property
    def gap(self) -> float:
        """How far generated samples are ahead of the references."""
        return self.generated - self.reference


class UpdateRule(Protocol):
    """Whether to train in this round."""

    def __call__(self, standing: Standing) -> bool: ...


@dataclass(frozen=True)
class Overtake:
    """Train only when generated samples outscore the references by more than ``margin`` (Adv-GRPO, eq. 7)."""

    margin: float = 0.0

    def __call__(self, standing: Standing) -> bool:
        return standing.gap > self.margin


@dataclass(frozen=True)
class Ratio:
    """Of every ``discriminator`` + ``generator`` rounds, train in the first ``discriminator``; (1, 0) is always.

    In the other rounds only the generator learns. Whether it rests in the first ones is for its own loop to say.
    """

    discriminator: int = 1
    generator: int = 0

    def __post_init__(self) -> None:
        if self.discriminator < 1 or self.generator < 0:
            raise ValueError(
                f"a ratio of {self.discriminator} to {self.generator} rounds is not possible: discriminator must be at"
                " least 1 and generator at least 0"
            )

    def __call__(self, standing: Standing) -> bool:
        return standing.round % (self.discriminator + self.generator) < self.discriminator


@dataclass(frozen=True)
class AccuracyBand:
    """Stop training once the accuracy reaches ``high``, start again when it has fallen below ``low``."""

    low: float = 0.6
    high: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"the band must satisfy 0 <= low <= high <= 1, not low {self.low}, high {self.high}")

    def __call__(self, standing: Standing) -> bool:
        return standing.accuracy < (self.high if standing.training else self.low)


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
class Batch:
    """Generated samples (B, ...) and their prompts."""

    samples: Tensor
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.prompts):
            raise ValueError(f"{len(self.samples)} samples have {len(self.prompts)} prompts: give one for each")

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Sequence[int]) -> Batch:
        """These rows."""
        return Batch(self.samples[list(index)], tuple(self.prompts[i] for i in index))

    def joined(self, other: Batch) -> Batch:
        """These samples, then those of ``other``."""
        return Batch(torch.cat([self.samples, other.samples]), self.prompts + other.prompts)

    def finite(self) -> Batch:
        """Without samples that hold NaN or infinity. Raises ValueError where none is left."""
        kept = self.samples.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        if not kept:
            raise ValueError(
                "no sample of this round is finite: the generator has diverged, or decodes in half precision"
            )
        return self if len(kept) == len(self) else self.rows(kept)


class Replay:
    """The last ``capacity`` generated samples, first in, first out; kept on the CPU in float16."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.kept: Batch | None = None

    def __len__(self) -> int:
        return 0 if self.kept is None else len(self.kept)

    def push(self, batch: Batch) -> None:
        """Add samples at the end; the oldest leave. Raises ValueError for samples of another shape."""
        if self.capacity == 0:
            return
        arrived = Batch(batch.samples.detach().to("cpu", torch.float16), batch.prompts)
        if self.kept is not None and self.kept.samples.shape[1:] != arrived.samples.shape[1:]:
            raise ValueError(
                f"samples were {tuple(self.kept.samples.shape[1:])} and are now {tuple(arrived.samples.shape[1:])}:"
                " keep one size per run"
            )
        joined = arrived if self.kept is None else self.kept.joined(arrived)
        self.kept = joined.rows(range(max(0, len(joined) - self.capacity), len(joined)))

    def draw(self, count: int, generator: torch.Generator) -> Batch | None:
        """At most ``count`` different samples in float32; None for none."""
        if self.kept is None or count == 0:
            return None
        drawn = self.kept.rows(torch.randperm(len(self.kept), generator=generator)[:count].tolist())
        return Batch(drawn.samples.float(), drawn.prompts)

    def tensors(self) -> dict[str, Tensor]:
        """Samples, and prompts as UTF-8 JSON; nothing where it is empty."""
        if self.kept is None:
            return {}
        rows = [{"text": prompt.text, "metadata": prompt.metadata} for prompt in self.kept.prompts]
        text = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)
        return {"samples": self.kept.samples, "prompts": text}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors()`` gave."""
        if "samples" not in tensors:
            self.kept = None
            return
        rows = json.loads(bytes(tensors["prompts"].tolist()))
        self.kept = Batch(tensors["samples"].cpu(), tuple(Prompt(row["text"], row["metadata"]) for row in rows))


class Weighting(Protocol):
    """How m logits of a sample make its score, and its loss."""

    def __call__(self, width: int, generator: torch.Generator) -> Tensor:
        """Weights (width,), 0 for a logit that is left out; ``generator`` is the same throughout a snapshot."""


def single(width: int, generator: torch.Generator) -> Tensor:
    """One logit is the score. Raises ValueError for more."""
    if width != 1:
        raise ValueError(f"the scorer gives {width} logits per sample: return (B,), or say how they are weighted")
    return torch.ones(1)


@dataclass(frozen=True)
class PatchWeights:
    """The logit of the whole image, and the mean of ``n_patches`` patch logits (Adv-GRPO, eqs. 9-14, appendix A).

    Which patches is drawn anew for each snapshot, the same for its scores and its training, and on every rank. The
    weights stand in the score and in the loss.
    """

    global_weight: float = 0.7
    local_weight: float = 0.3
    n_patches: int = 64

    def __post_init__(self) -> None:
        if min(self.global_weight, self.local_weight) < 0 or self.global_weight + self.local_weight <= 0:
            raise ValueError(
                "global_weight and local_weight must not be negative, nor both 0, but are"
                f" {self.global_weight} and {self.local_weight}"
            )
        if self.n_patches < 1:
            raise ValueError(f"n_patches must be at least 1, not {self.n_patches}; local_weight=0 leaves patches out")

    def __call__(self, width: int, generator: torch.Generator) -> Tensor:
        """Weights of 1 + n logits, the image's first. Raises ValueError for fewer patches than ``n_patches``."""
        weights = torch.zeros(width)
        weights[0] = self.global_weight
        if self.local_weight:
            if self.n_patches > width - 1:
                raise ValueError(f"n_patches is {self.n_patches}, but the features have {width - 1} patches: lower it")
            chosen = torch.randperm(width - 1, generator=generator)[: self.n_patches]
            weights[1 + chosen] = self.local_weight / self.n_patches
        return weights


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


def mlp_head(width: int, hidden: int = 512, seed: int = 0) -> nn.Sequential:
    """Adv-GRPO's head, Linear - GELU - Linear, from features (..., width) to logits (..., 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))


class HeadScorer(nn.Module):
    """A head, shared by the global and the patch features of a frozen backbone; it ignores the prompts.

    ``tokens`` (a function, whose own parameters are never trained) gives features (B, m, d), the global one first.
    The head is a copy in float32, whatever the features' dtype.
    """

    def __init__(self, tokens: Callable[[Tensor], Tensor], head: nn.Module) -> None:
        super().__init__()
        self._tokens = functools.partial(tokens)  # not registered, even where it is a module
        self.head = copy.deepcopy(head).float().requires_grad_(True)

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Logits (B, m). Raises ValueError for a head that does not give one logit per token."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            tokens = self._tokens(images).float()
        logits: Tensor = self.head(tokens)
        if logits.shape != (*tokens.shape[:2], 1):
            raise ValueError(
                f"the head made {tuple(logits.shape)} of features {tuple(tokens.shape)}: its last layer must have one"
                " output, as that of mlp_head"
            )
        return logits.squeeze(-1)


class AdversarialReward(Adversary):
    """Adv-GRPO's reward by a vision foundation model (arXiv 2511.20256, eqs. 9-14): a head on frozen features.

    ``features`` is the one function for training and scoring; patch logits need ``PatchFeatures``, and a function of
    global features alone needs ``PatchWeights(local_weight=0)``. ``head`` maps (..., d) to (..., 1), by default
    ``mlp_head``. ``output`` is the score: "logit", its "sigmoid", or "logit_minus_reference", the logit less the mean
    logit of all references of the prompt (with Pool, of the whole pool, scored once per snapshot).

    The paper makes ten steps of the discriminator for one of the generator: here by ten ``steps_per_update`` in every
    round (``Ratio()``, the default rule). Raises ValueError where features, head and weights do not fit together; opens
    the features for that.
    """

    def __init__(
        self,
        features: Callable,  # type: ignore[type-arg]  # bare: configurations name any FeatureFunction or PatchFeatures
        references: References,
        head: nn.Module | None = None,
        weights: PatchWeights = PatchWeights(),
        output: Literal["logit", "sigmoid", "logit_minus_reference"] = "logit",
        update_rule: UpdateRule | None = None,  # None, since a configuration cannot replace a default dataclass
        learning: Learning = Learning(),
    ) -> None:
        if output not in ("logit", "sigmoid", "logit_minus_reference"):
            raise ValueError(f'output must be "logit", "sigmoid" or "logit_minus_reference", not {output!r}')
        tokens = _token_function(features, patches=weights.local_weight > 0)
        width = _width(tokens, references)
        scorer = HeadScorer(tokens, head or mlp_head(width, seed=learning.seed))
        super().__init__(scorer, references, update_rule or Ratio(), learning, weights)
        self.output = output
        self._baselines: dict[Sequence[int], Tensor] = {}
        self._baselines_of = self.snapshot
        self.score(references.images.load([0]), [Prompt("")])  # refuse a misfit before any training

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, by the snapshot; NaN where a sample has NaN."""
        logits = self.score(samples, prompts)
        match self.output:
            case "logit":
                return logits
            case "sigmoid":
                return logits.sigmoid()
            case "logit_minus_reference":
                means = [self._baseline(self.references.rows(prompt)) for prompt in prompts]
                return logits - torch.stack(means).to(logits.device)

    @torch.no_grad()
    def _baseline(self, rows: Sequence[int]) -> Tensor:
        """The mean logit () of these references by the snapshot; computed once."""
        if self._baselines_of is not self.snapshot:
            self._baselines, self._baselines_of = {}, self.snapshot
        if rows not in self._baselines:
            size, device = self.learning.batch_size, self._device()
            parts = [rows[i : i + size] for i in range(0, len(rows), size)]
            scores = [
                self.score(self.references.images.load(part).to(device), [Prompt("")] * len(part)) for part in parts
            ]
            self._baselines[rows] = torch.cat(scores).mean()
        return self._baselines[rows]


class TunedClip(nn.Module):
    """A cosine scorer by CLIP whose last ``blocks`` visual blocks are a trainable float32 copy; the rest is frozen.

    ``model`` and ``processor`` are those of ``rewards.clip.load_clip``, whose shared weights are left as they are.
    Raises ValueError for another number of blocks than the model has.
    """

    def __init__(self, model: str, blocks: int = 2, processor: str | None = None) -> None:
        super().__init__()
        self.encoder = load_clip(model, processor)
        available = len(self.encoder.blocks)
        if not 1 <= blocks <= available:
            raise ValueError(f"blocks must be 1 to {available}, the visual blocks of {model}, not {blocks}")
        chosen = {id(parameter) for parameter in self.encoder.blocks[-blocks:].parameters()}
        found = {name: p for name, p in self.encoder.named_parameters() if id(p) in chosen}
        self._names = tuple(found)
        self.copies = nn.ParameterList(nn.Parameter(parameter.detach().clone().float()) for parameter in found.values())

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Cosines (B,) of images (B, 3, H, W) in [0, 1] and their prompts."""
        weights = dict(zip(self._names, self.copies, strict=True))
        embedding: Tensor = functional_call(self.encoder, weights, (images,))
        return cosine(embedding, self.encoder.text([prompt.text for prompt in prompts]))


class TunedClipReward(Adversary):
    """An adversarially tuned preference reward (Adv-GRPO, arXiv 2511.20256, section 4.2).

    The score is ``ClipReward``'s cosine. Its last ``blocks`` visual blocks learn that a reference of a prompt beats a
    generated sample of it (Bradley-Terry on cosines times the model's logit scale), when generated ones score higher
    (``Overtake()``, the default rule).
    """

    def __init__(
        self,
        model: str,
        references: References,
        blocks: int = 2,
        processor: str | None = None,
        update_rule: UpdateRule | None = None,
        learning: Learning = Learning(loss="bt_pairwise", learning_rate=5e-6),
    ) -> None:
        scorer = TunedClip(model, blocks, processor)
        super().__init__(scorer, references, update_rule or Overtake(), learning, scale=scorer.encoder.logit_scale)


def _token_function(features: FeatureFunction | PatchFeatures, patches: bool) -> Callable[[Tensor], Tensor]:
    """Features (B, 1 + n, d), the global one first; n = 0 without ``patches``."""
    if not patches:
        return lambda samples: features(samples).unsqueeze(1)
    if not isinstance(features, PatchFeatures):
        raise ValueError(
            "these features have no patches: give ClipFeatures or Dinov2Features, or weights=PatchWeights(1.0, 0.0)"
        )
    return lambda samples: _joined(features.features(samples))


def _joined(found: Features) -> Tensor:
    return torch.cat([found.global_.unsqueeze(1), found.patches], dim=1)


@torch.no_grad()
def _width(tokens: Callable[[Tensor], Tensor], references: References) -> int:
    """d, from the first reference."""
    found = tokens(references.images.load([0]))
    if found.ndim != 3:
        raise ValueError(f"features must be (B, d), but are {(len(found), *found.shape[2:])}: pool them")
    return found.shape[-1]


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
