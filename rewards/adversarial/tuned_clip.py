"""CLIP tuned against the generator (Adv-GRPO, arXiv 2511.20256, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.func import functional_call

from genalign.types import Prompt
from rewards.adversarial.adversary import Adversary, DiscriminatorSettings
from rewards.adversarial.update_rules import Overtake, UpdateRule
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.encoders import cosine
from rewards.backbones.reference_images import References


class TunedClip(nn.Module):
    """A cosine scorer by CLIP whose last ``blocks`` visual blocks are a trainable float32 copy; the rest is frozen.

    ``model`` and ``processor`` are as in ``rewards.backbones.clip_encoder.load_clip``, whose shared weights are not
    changed. Raises ValueError for another number of blocks than the model has.
    """

    def __init__(self, model: str, blocks: int = 2, processor: str | None = None) -> None:
        super().__init__()
        self.encoder = load_clip(model, processor)
        available = len(self.encoder.blocks)
        if not 1 <= blocks <= available:
            raise ValueError(f"blocks must be 1 to {available}, the visual blocks of {model}, not {blocks}")
        trainable = {id(parameter) for parameter in self.encoder.blocks[-blocks:].parameters()}
        parameters = {name: p for name, p in self.encoder.named_parameters() if id(p) in trainable}
        self._names = tuple(parameters)
        self.copies = nn.ParameterList(nn.Parameter(p.detach().clone().float()) for p in parameters.values())

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compute cosines (B,) of images (B, 3, H, W) in [0, 1] and their prompts."""
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
        learning: DiscriminatorSettings = DiscriminatorSettings(loss="bt_pairwise", learning_rate=5e-6),
    ) -> None:
        scorer = TunedClip(model, blocks, processor)
        super().__init__(scorer, references, update_rule or Overtake(), learning, scale=scorer.encoder.logit_scale)
