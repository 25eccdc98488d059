"""Preference rewards tuned against the generator (Adv-GRPO, arXiv 2511.20256, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from genalign.reward_learning.noise_aware import NetworkReward
from genalign.types import AnyCallable, Prompt
from rewards.adversarial.adversary import Adversary, DiscriminatorSettings
from rewards.adversarial.update_rules import Overtake, UpdateRule
from rewards.backbones.reference_images import References


@runtime_checkable
class TunableNetwork(Protocol):
    """The network of a preference reward, a module called with samples and prompts."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that samples pass through, first to last."""

    @property
    def logit_scale(self) -> float:
        """The factor from scores to logits of a preference, as the reward was trained."""


class TunedNetwork(nn.Module):
    """A preference network whose last ``blocks`` blocks are a trainable float32 copy; the rest is frozen.

    The shared weights of ``reward`` are not changed. Raises ValueError for a reward without such a network, another
    number of blocks than it has, or blocks in another precision than float32.
    """

    def __init__(self, reward: AnyCallable, blocks: int = 2) -> None:
        super().__init__()
        untyped: Any = reward
        network = untyped.network() if isinstance(untyped, NetworkReward) else None
        if network is None or not isinstance(network, TunableNetwork):
            raise ValueError(
                f"{type(reward).__name__} has no blocks to tune: give a learned reward, rewards.clip.ClipReward,"
                " rewards.pickscore.PickScoreReward, rewards.hps.HPSReward or rewards.imagereward.ImageReward"
            )
        available = list(network.blocks)
        if not 1 <= blocks <= len(available):
            raise ValueError(f"blocks must be 1 to {len(available)}, the blocks of {reward}, not {blocks}")
        trainable = {id(parameter) for block in available[-blocks:] for parameter in block.parameters()}
        parameters = {name: p for name, p in network.named_parameters() if id(p) in trainable}
        if other := {p.dtype for p in parameters.values()} - {torch.float32}:
            raise ValueError(f"the tuned blocks are in {other.pop()}: give {type(reward).__name__} dtype float32")
        network.requires_grad_(False)  # as published ones are; the copies are trained
        self.network, self.logit_scale, self._names = network, network.logit_scale, tuple(parameters)
        self.copies = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in parameters.values())

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] of their prompts as (B,)."""
        weights = dict(zip(self._names, self.copies, strict=True))
        scores: Tensor = functional_call(self.network, weights, (images, prompts))
        return scores


class TunedPreferenceReward(Adversary):
    """An adversarially tuned preference reward (Adv-GRPO, arXiv 2511.20256, section 4.2).

    The score is that of ``reward``, at first with its own weights. The last blocks of its network learn that a
    reference of a prompt beats a generated sample of it (Bradley-Terry on scores times the network's logit scale).
    Raises ValueError as ``TunedNetwork`` does.

    Args:
        reward: The reward, with weights in float32: a learned one, ``rewards.clip.ClipReward``,
            ``rewards.pickscore.PickScoreReward``, ``rewards.hps.HPSReward`` or ``rewards.imagereward.ImageReward``.
        references: Images to tell generated ones from, by prompt or as a pool.
        blocks: The number of blocks that learn, counted from the last. They are those of the image encoder; of
            ImageReward first these and then those of the text encoder, which attends to the image, and its head stays
            as it is; of a learned reward the heads of all members, as one block.
        update_rule: In which rounds the blocks are trained; null takes ``Overtake()``, when generated samples score
            higher than references.
        learning: Loss, optimizer and batches.
    """

    def __init__(
        self,
        reward: AnyCallable,
        references: References,
        blocks: int = 2,
        update_rule: UpdateRule | None = None,
        learning: DiscriminatorSettings = DiscriminatorSettings(loss="bt_pairwise", learning_rate=5e-6),
    ) -> None:
        scorer = TunedNetwork(reward, blocks)
        super().__init__(scorer, references, update_rule or Overtake(), learning, scale=scorer.logit_scale)
