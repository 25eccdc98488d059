"""Rewards that are trained against the generator (Adv-GRPO, arXiv 2511.20256).

A scorer is any ``nn.Module`` with ``forward(images, prompts)`` giving logits (B,) or (B, m); ``Adversary`` trains those
of its parameters that require a gradient to tell references from generated samples, and scores by a frozen copy.
No gradient of the generator flows through it during training: samples arrive detached.
"""

from rewards.adversarial.adversary import Adversary, Learning, Snapshot
from rewards.adversarial.heads import AdversarialReward, HeadScorer, mlp_head
from rewards.adversarial.losses import LossName, adversarial_loss, pair_accuracy
from rewards.adversarial.preferences import TunedClip, TunedClipReward
from rewards.adversarial.replay import Batch, Replay
from rewards.adversarial.rules import AccuracyBand, Overtake, Ratio, Standing, UpdateRule
from rewards.adversarial.weighting import PatchWeights, Weighting, single

__all__ = [
    "AccuracyBand",
    "AdversarialReward",
    "Adversary",
    "Batch",
    "HeadScorer",
    "Learning",
    "LossName",
    "Overtake",
    "PatchWeights",
    "Ratio",
    "Replay",
    "Snapshot",
    "Standing",
    "TunedClip",
    "TunedClipReward",
    "UpdateRule",
    "Weighting",
    "adversarial_loss",
    "mlp_head",
    "pair_accuracy",
    "single",
]
