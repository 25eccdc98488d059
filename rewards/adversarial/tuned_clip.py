"""CLIP tuned against the generator (Adv-GRPO, arXiv 2511.20256, section 4.2)."""

from __future__ import annotations

from rewards.adversarial.adversary import DiscriminatorSettings
from rewards.adversarial.tuned_preference import TunedPreferenceReward
from rewards.adversarial.update_rules import UpdateRule
from rewards.backbones.reference_images import References
from rewards.clip import ClipReward


class TunedClipReward(TunedPreferenceReward):
    """``TunedPreferenceReward`` of ``ClipReward``: the last visual blocks learn, on cosines times the logit scale.

    Args:
        model: An embedded CLIP ("shapes-clip"), an open_clip folder, a transformers folder or a Hub id.
        references: Images to tell generated ones from, by prompt or as a pool.
        blocks: The number of visual blocks that learn, counted from the last.
        processor: The folder or Hub id of the tokenizer and image processor, where a transformers checkpoint has none
            beside its weights; null for the model's own.
        update_rule: In which rounds the blocks are trained; null takes ``Overtake()``.
        learning: Loss, optimizer and batches.
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
