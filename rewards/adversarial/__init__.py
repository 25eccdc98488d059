"""Rewards that are trained against the generator (Adv-GRPO, arXiv 2511.20256).

A scorer is any ``nn.Module`` with ``forward(images, prompts)`` giving logits (B,) or (B, m); ``Adversary`` trains those
of its parameters that require a gradient to tell references from generated samples, and scores by a frozen copy.
No gradient of the generator flows through it during training: samples arrive detached.
"""

from rewards.adversarial.adversary import (
    Adversary,
    DiscriminatorSettings,
    LossName,
    PatchWeights,
    ScoringWeights,
    Weighting,
    adversarial_loss,
    pair_accuracy,
    single,
)
from rewards.adversarial.heads import AdversarialReward, HeadScorer, mlp_head
from rewards.adversarial.replay_buffer import ReplayBuffer, SampleBatch
from rewards.adversarial.tuned_clip import TunedClip, TunedClipReward
from rewards.adversarial.update_rules import AccuracyBand, DiscriminatorStatus, Overtake, Ratio, UpdateRule

__all__ = [
    "AccuracyBand",
    "AdversarialReward",
    "Adversary",
    "DiscriminatorSettings",
    "DiscriminatorStatus",
    "HeadScorer",
    "LossName",
    "Overtake",
    "PatchWeights",
    "Ratio",
    "ReplayBuffer",
    "SampleBatch",
    "ScoringWeights",
    "TunedClip",
    "TunedClipReward",
    "UpdateRule",
    "Weighting",
    "adversarial_loss",
    "mlp_head",
    "pair_accuracy",
    "single",
]
