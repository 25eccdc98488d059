"""A head on the features of a frozen vision model as an adversarial reward (Adv-GRPO, arXiv 2511.20256, eqs. 9-14)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from genalign.runtime.distributed import seeded
from genalign.types import AnyCallable, FeatureFunction, Prompt
from rewards.adversarial.adversary import Adversary, DiscriminatorSettings, FeatureScorer, PatchWeights
from rewards.adversarial.update_rules import Ratio, UpdateRule
from rewards.backbones.encoders import PatchFeatures
from rewards.backbones.reference_images import References


def mlp_head(width: int, hidden: int = 512, seed: int = 0) -> nn.Sequential:
    """Build Adv-GRPO's head, Linear - GELU - Linear, from features (..., width) to logits (..., 1)."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))


class HeadScorer(FeatureScorer):
    """A head, shared by the global and the patch features of a frozen backbone; it ignores the prompts.

    ``tokens`` (a function, whose own parameters are never trained) gives features (B, m, d), the global one first.
    The head is a copy in float32, whatever the features' dtype.
    """

    def __init__(self, tokens: Callable[[Tensor], Tensor], head: nn.Module) -> None:
        super().__init__()
        self._tokens = functools.partial(tokens)  # not registered, even where it is a module
        self.head = copy.deepcopy(head).float().requires_grad_(True)

    def features(self, samples: Tensor) -> Tensor:
        """Compute features (B, m, d) in float32; differentiable in samples that require a gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and samples.requires_grad):
            return self._tokens(samples).float()

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits (B, m) from features (B, m, d). Raises ValueError for a head of other outputs."""
        logits: Tensor = self.head(features)
        if logits.shape != (*features.shape[:2], 1):
            shapes = f"features {tuple(features.shape)} to {tuple(logits.shape)}"
            raise ValueError(f"the head maps {shapes}: its last layer must have one output, as in mlp_head")
        return logits.squeeze(-1)


class AdversarialReward(Adversary):
    """Adv-GRPO's reward by a vision foundation model (arXiv 2511.20256, eqs. 9-14): a head on frozen features.

    The same features serve training and scoring. The score is the weighted logit.

    The paper makes ten steps of the discriminator for one of the generator: here by ten ``steps_per_update`` in every
    round. Raises ValueError where features, head and weights do not fit together; opens the features for that.

    Args:
        features: The features of a frozen model, with patches (``rewards.backbones.encoders.PatchFeatures``); a
            function of global features alone needs ``local_weight`` 0.
        references: Images to tell generated ones from, by prompt or as a pool.
        head: The trained head, from features (..., d) to logits (..., 1); null takes ``mlp_head``.
        weights: The weights of the logits of the image and of its patches.
        update_rule: In which rounds the head is trained; null takes ``Ratio()``, which is every round.
        learning: Loss, optimizer and batches.
    """

    def __init__(
        self,
        features: AnyCallable,
        references: References,
        head: nn.Module | None = None,
        weights: PatchWeights = PatchWeights(),
        update_rule: UpdateRule | None = None,  # None, since a configuration cannot replace a default dataclass
        learning: DiscriminatorSettings = DiscriminatorSettings(),
    ) -> None:
        tokens = _token_function(features, patches=weights.local_weight > 0)
        with torch.no_grad():
            shape = tokens(references.images.load([0])).shape
        if len(shape) != 3:
            raise ValueError(f"features must be (B, d), but are {(shape[0], *shape[2:])}: pool them")
        scorer = HeadScorer(tokens, head or mlp_head(shape[-1], seed=learning.seed))
        super().__init__(scorer, references, update_rule or Ratio(), learning, weights)
        self(references.images.load([0]), [Prompt("")])  # refuse a misfit before any training


def _token_function(features: FeatureFunction | PatchFeatures, patches: bool) -> Callable[[Tensor], Tensor]:
    """Return a function to features (B, 1 + n, d), the global one first; n = 0 without ``patches``."""
    if not patches:
        return lambda samples: features(samples).unsqueeze(1)
    if not isinstance(features, PatchFeatures):
        raise ValueError(
            "these features have no patches: give ClipFeatures or Dinov3Features, or weights=PatchWeights(1.0, 0.0)"
        )

    def tokens(samples: Tensor) -> Tensor:
        output = features.features(samples)
        return torch.cat([output.global_.unsqueeze(1), output.patches], dim=1)

    return tokens
