"""Preference rewards tuned against the generator, on the tiny random checkpoints of their own tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genalign.reward_learning.network import Head, RewardEncoder, RewardNetwork
from genalign.types import Prompt
from rewards.adversarial import DiscriminatorSettings, Ratio, TunedPreferenceReward
from rewards.adversarial.tuned_preference import TunedNetwork
from rewards.backbones.reference_images import ImageTensor, ReferencesByPrompt
from rewards.clip import ClipReward
from rewards.hps import HPSReward
from rewards.imagereward import ImageReward
from rewards.pickscore import PickScoreReward
from tests.rewards import test_imagereward, test_pickscore_and_hps

architecture, hps, pickscore = (
    getattr(test_pickscore_and_hps, name) for name in ("architecture", "hps", "pickscore")
)  # fixtures
tensors, imagereward = test_imagereward.tensors, test_imagereward.reward

PROMPTS = [Prompt("a red circle"), Prompt("two rings")] * 2
LEARNING = DiscriminatorSettings(loss="bt_pairwise", learning_rate=1e-3, steps_per_update=4, batch_size=8, replay=8)


def images(level: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (level + 0.1 * torch.randn(4, 3, 16, 16, generator=generator)).clamp(0, 1)


REFERENCES = ReferencesByPrompt(ImageTensor(images(0.7, 0)), [prompt.text for prompt in PROMPTS])
FAKES = images(0.3, 1)


def logit_scale(reward: Any) -> float:
    """The factor from scores to the logits that the reward was trained on."""
    if isinstance(reward, ImageReward):
        return 1.0333394966054072  # the deviation of the head's outputs, by which the score is divided
    return 1.0 if isinstance(reward, PickScoreReward) else float(reward.encoder(None).model.logit_scale.exp())


@pytest.mark.parametrize("name", ["hps", "pickscore", "imagereward"])
def test_a_preference_starts_as_published_and_learns_to_prefer_references(
    name: str, request: pytest.FixtureRequest
) -> None:
    reward: HPSReward | PickScoreReward | ImageReward = request.getfixturevalue(name)
    tuned = TunedPreferenceReward(reward, REFERENCES, 1, Ratio(), LEARNING)
    start = reward(FAKES, PROMPTS)
    torch.testing.assert_close(tuned(FAKES, PROMPTS), start, rtol=1e-5, atol=1e-5)
    assert tuned.scale == pytest.approx(logit_scale(reward))
    metrics = [tuned.update(FAKES, PROMPTS) for _ in range(4)]
    assert metrics[-1]["loss"] < metrics[0]["loss"] and metrics[-1]["gap"] < metrics[0]["gap"]
    assert torch.equal(reward(FAKES, PROMPTS), start)  # the shared network is untouched
    assert not torch.equal(tuned(FAKES, PROMPTS), start)
    again = TunedPreferenceReward(reward, REFERENCES, 1, Ratio(), LEARNING)
    again.load_tensors(tuned.tensors())
    assert again.update(FAKES, PROMPTS) == tuned.update(FAKES, PROMPTS)
    leaf = FAKES.clone().requires_grad_(True)
    tuned(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None and (leaf.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_last_blocks_of_imagereward_are_those_of_its_text_encoder(imagereward: ImageReward) -> None:
    def tuned(blocks: int) -> set[str]:
        return {name.rsplit(".layer", 1)[0].split(".layers")[0] for name in TunedNetwork(imagereward, blocks)._names}

    assert tuned(2) == {"text.encoder"} and tuned(3) == {"text.encoder", "vision.encoder"}
    one = TunedNetwork(imagereward, 1)
    assert all(name.startswith("text.encoder.layer.1.") for name in one._names)


class Colors(RewardEncoder):
    """The mean color of an image, by a frozen identity."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3, bias=False).requires_grad_(False)
        nn.init.eye_(self.map.weight)

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        tokens: Tensor = self.map(samples.mean((2, 3)))[:, None]
        return tokens

    @property
    def arguments(self) -> dict[str, Any]:
        return {}

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return (self.map,)


class Linear(Head):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.last = nn.Linear(3, 1)
        nn.init.constant_(self.last.weight, weight)

    def features(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.features(tokens))
        return outputs


@dataclass(frozen=True)
class Learned:
    """A reward that was learned from preferences, which likes the dark."""

    ensemble: RewardNetwork

    def network(self) -> nn.Module:
        return self.ensemble

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores: Tensor = self.ensemble(samples, prompts)
        return scores


def test_a_learned_reward_is_tuned_in_the_heads_of_all_its_members() -> None:
    learned = Learned(RewardNetwork(Colors(), [Linear(-1.0), Linear(-2.0)]))
    start = learned(FAKES, PROMPTS).detach()
    learning = replace(LEARNING, learning_rate=0.1)
    tuned = TunedPreferenceReward(learned, REFERENCES, 1, update_rule=None, learning=learning)
    assert len(tuned.trained) == 4 and tuned.scale == 1.0
    metrics = [tuned.update(FAKES, PROMPTS) for _ in range(8)]
    assert metrics[0]["gap"] > 0.3 and metrics[-1]["gap"] <= 0 and metrics[-1]["updated"] == 0  # Overtake
    assert torch.equal(learned(FAKES, PROMPTS), start)


def test_what_cannot_be_tuned_is_refused(hps: HPSReward) -> None:
    with pytest.raises(ValueError, match=r"blocks must be 1 to 2, the blocks of HPSReward\(.*, not 3"):
        TunedPreferenceReward(hps, REFERENCES, 3)
    with pytest.raises(ValueError, match=r"tuned blocks are in torch\.bfloat16: give HPSReward dtype float32"):
        TunedPreferenceReward(replace(hps, dtype="bfloat16"), REFERENCES)
    with pytest.raises(ValueError, match="Any has no blocks to tune: give a learned reward, rewards"):
        TunedPreferenceReward(type("Any", (), {"__call__": lambda *_: None})(), REFERENCES)
    with pytest.raises(ValueError, match="blocks must be 1 to 4, the blocks of ClipReward"):
        TunedPreferenceReward(ClipReward("shapes-clip"), REFERENCES, 0)
