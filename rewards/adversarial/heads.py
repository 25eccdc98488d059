"""A head on the features of a frozen vision model as an adversarial reward (Adv-GRPO, arXiv 2511.20256, eqs. 9-14)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from genalign.types import AnyCallable, FeatureFunction, Prompt
from rewards.adversarial.adversary import Adversary, DiscriminatorSettings, PatchWeights
from rewards.adversarial.update_rules import Ratio, UpdateRule
from rewards.backbones.encoders import PatchFeatures
from rewards.backbones.reference_images import References


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
    logit of all references of the prompt (with ReferencePool, of the whole pool, scored once per snapshot).

    The paper makes ten steps of the discriminator for one of the generator: here by ten ``steps_per_update`` in every
    round (``Ratio()``, the default rule). Raises ValueError where features, head and weights do not fit together; opens
    the features for that.
    """

    def __init__(
        self,
        features: AnyCallable,
        references: References,
        head: nn.Module | None = None,
        weights: PatchWeights = PatchWeights(),
        output: Literal["logit", "sigmoid", "logit_minus_reference"] = "logit",
        update_rule: UpdateRule | None = None,  # None, since a configuration cannot replace a default dataclass
        learning: DiscriminatorSettings = DiscriminatorSettings(),
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


def _token_function(features: FeatureFunction | PatchFeatures, patches: bool) -> Callable[[Tensor], Tensor]:
    """Features (B, 1 + n, d), the global one first; n = 0 without ``patches``."""
    if not patches:
        return lambda samples: features(samples).unsqueeze(1)
    if not isinstance(features, PatchFeatures):
        raise ValueError(
            "these features have no patches: give ClipFeatures or Dinov2Features, or weights=PatchWeights(1.0, 0.0)"
        )

    def tokens(samples: Tensor) -> Tensor:
        output = features.features(samples)
        return torch.cat([output.global_.unsqueeze(1), output.patches], dim=1)

    return tokens


@torch.no_grad()
def _width(tokens: Callable[[Tensor], Tensor], references: References) -> int:
    """The feature width d, read from the first reference."""
    features = tokens(references.images.load([0]))
    if features.ndim != 3:
        raise ValueError(f"features must be (B, d), but are {(len(features), *features.shape[2:])}: pool them")
    return features.shape[-1]
