import numpy as np
import pytest
import torch

from genalign.types import Prompt, Reward
from genalign.worlds.tones.prompts import attribution, counting, single_tone
from genalign.worlds.tones.scenes import render, sample_clip
from genalign.worlds.tones.verifier import verify
from rewards.tones import TonesReward, TonesScore

PROMPTS = [single_tone("sine"), counting("square", "two"), attribution("organ", "C4", "sine", "A5")]


@pytest.fixture(scope="module")
def waves() -> torch.Tensor:
    rng = np.random.default_rng(5)
    return render([sample_clip(prompt.metadata, rng) for prompt in PROMPTS])


@pytest.mark.parametrize("score", ["partial", "strict", "relaxed"])
def test_truth_scores_one(waves: torch.Tensor, score: str) -> None:
    reward: Reward = TonesReward(score)
    scores = reward(waves, PROMPTS)
    assert isinstance(reward, Reward)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1, 1, 1]


def test_wrong_clips_score_less(waves: torch.Tensor) -> None:
    assert TonesReward("strict")(waves[[1, 0, 0]], PROMPTS).tolist() == [0, 0, 0]
    assert (TonesReward()(waves[[1, 0, 0]], PROMPTS) < 0.7).all()


def test_surplus_is_relaxed_but_not_strict(waves: torch.Tensor) -> None:
    prompts = [single_tone("square")]
    assert TonesReward("relaxed")(waves[1:2], prompts).tolist() == [1]
    assert TonesReward("strict")(waves[1:2], prompts).tolist() == [0]


def test_each_criterion_is_a_score(waves: torch.Tensor) -> None:
    """Square tones for a sine, a sine for two square tones, and a sine for an organ and a sine, of given notes."""
    shown = waves[[1, 0, 0]]
    criteria = [dict(verification.criteria) for verification in verify(shown, [p.metadata for p in PROMPTS])]
    names: tuple[TonesScore, ...] = ("count", "kind", "note", "relation", "loudness")
    for name in names:
        expected = [found.get(name, 1.0) for found in criteria]
        assert TonesReward(name)(shown, PROMPTS).tolist() == pytest.approx(expected)
    assert TonesReward("note")(shown, PROMPTS).tolist() == [1, 1, 0]  # two of the prompts name no note


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_failed_samples_are_nan(waves: torch.Tensor, value: float) -> None:
    broken = waves.clone()
    broken[1, 0, 100] = value
    assert TonesReward()(broken, PROMPTS).isnan().tolist() == [False, True, False]


def test_metadata_is_needed(waves: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"'a bell' has no metadata: this reward needs GenEval metadata"):
        TonesReward()(waves[:1], [Prompt("a bell")])
