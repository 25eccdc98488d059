"""CLIP tuned against the generator (Adv-GRPO, arXiv 2511.20256, section 4.2)."""

from __future__ import annotations

from rewards.adversarial.adversary import DiscriminatorSettings
from rewards.adversarial.tuned_preference import TunedPreferenceReward
from rewards.adversarial.update_rules import UpdateRule
from rewards.backbones.reference_images import References
from rewards.clip import ClipReward


class TunedClipReward(TunedPreferenceReward):
    """``TunedPreferenceReward`` of ``ClipReward``, whose ``model`` and ``processor`` it takes.

    Its last ``blocks`` visual blocks learn, on cosines times the model's logit scale.
    """

    def __init__(
        self,
        model: str,
        references: References,
        blocks: int = 2,
        processor: str | None = None,
        update_rule: UpdateRule | None = None,
        learning: DiscriminatorSettings = DiscriminatorSettings(loss="bt_pairwise", learning_rate=5e-6),
    ) -> None:
        super().__init__(ClipReward(model, processor), references, blocks, update_rule, learning)
