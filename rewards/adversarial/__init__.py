"""Rewards that are trained against the generator (Adv-GRPO, arXiv 2511.20256).

A scorer is any ``nn.Module`` with ``forward(images, prompts)`` giving logits (B,) or (B, m); ``Adversary`` trains those
of its parameters that require a gradient to tell references from generated samples, and scores by a frozen copy.
No gradient of the generator flows through it during training: samples arrive detached.
"""

from rewards.adversarial.adversary import Adversary as Adversary
from rewards.adversarial.adversary import DiscriminatorSettings as DiscriminatorSettings
from rewards.adversarial.adversary import PatchWeights as PatchWeights
from rewards.adversarial.discriminator_heads import AdversarialReward as AdversarialReward
from rewards.adversarial.tuned_clip import TunedClipReward as TunedClipReward
from rewards.adversarial.tuned_preference import TunedPreferenceReward as TunedPreferenceReward
from rewards.adversarial.update_rules import AccuracyBand as AccuracyBand
from rewards.adversarial.update_rules import Overtake as Overtake
from rewards.adversarial.update_rules import Ratio as Ratio
