"""Noise-aware scorers on unmodified pipelines: they decide in place of the rewards of decoded previews."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from genalign.reward_learning.noise_aware import LevelQuality, RewardIdentity
from genalign.search import FKSteering, Prune, SearchResult
from genalign.search.engine import Particles, SearchRun
from genalign.search.noise_aware import NoiseAware, ScorerLevel
from genalign.types import Prompt
from pipelines import prune, steer
from pipelines.steering.scheduler_hooks import grid_of
from rewards.clip import ClipReward
from rewards.noise_aware import LatentImageDistilled, SelfDistilled

PROMPT, STEPS = "a red circle", 4
REWARD = ClipReward("shapes-clip")


@pytest.fixture(scope="module")
def pipe(tiny_folder: object) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(str(tiny_folder))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(STEPS)
    return pipe


def scorer_of(
    pipe: StableDiffusion3Pipeline, student: type[SelfDistilled] = SelfDistilled, **arguments: Any
) -> NoiseAware:
    """A scorer whose student is not trained, validated at the levels of the first two steps."""
    torch.manual_seed(0)
    made = student(REWARD, lora_rank=2, **arguments)
    weights = {name: weight.detach().clone() for name, weight in made.named_parameters() if weight.requires_grad}
    pipe.scheduler.set_timesteps(STEPS)
    shares = grid_of(pipe.scheduler).noise_share[:2].tolist()
    levels = tuple(ScorerLevel(LevelQuality(share, 0.5, 0.5, 0.0), weights) for share in shares)
    return NoiseAware(
        lambda reward: student(reward, lora_rank=2, **arguments), made.input_kind, levels, RewardIdentity.of(REWARD)
    )


def pruned(pipe: StableDiffusion3Pipeline, strategy: Prune, reward: Any = REWARD) -> SearchResult:
    return prune(pipe, PROMPT, reward, strategy, num_inference_steps=STEPS, max_sequence_length=8)


def test_pruning_by_an_untrained_student_is_pruning_by_the_reward(pipe: StableDiffusion3Pipeline) -> None:
    raw = pruned(pipe, Prune((1,), (0.5,), 4))
    aware = pruned(pipe, Prune((1,), (0.5,), 4, scorer_of(pipe)))
    torch.testing.assert_close(aware.per_prompt[0].samples, raw.per_prompt[0].samples)
    counts = aware.per_prompt[0].ledger.counts
    assert counts["reward/noise-aware"] == 4 and counts["reward/reward"] == 2 and counts["decode"] == 6


def test_a_student_of_latents_decides_without_decoding(pipe: StableDiffusion3Pipeline) -> None:
    scorer = scorer_of(pipe, LatentImageDistilled, channels=4, scale=4, width=4, depth=1)
    result = pruned(pipe, Prune((1,), (0.25,), 4, scorer))
    previews = [node["scores"][0][1][0] for node in result.lineage]
    assert result.winners == (max(range(4), key=previews.__getitem__),)
    assert result.per_prompt[0].ledger.counts["decode"] == 1


def test_steering_by_a_student(pipe: StableDiffusion3Pipeline) -> None:
    strategy = FKSteering(4, lam=50.0, start=0.25, stop=0.25, scorer=scorer_of(pipe))
    with steer(pipe, REWARD, strategy) as steering:
        pipe(PROMPT, num_images_per_prompt=4, num_inference_steps=STEPS, max_sequence_length=8)
    counts = steering.ledger.counts
    assert counts["reward/noise-aware"] == 4 and counts["reward/reward"] == 4 and counts["decode"] == 8


def test_impossible_scorers_are_refused(pipe: StableDiffusion3Pipeline) -> None:
    class Needy:
        def __call__(self, run: SearchRun, candidates: Particles) -> Tensor:
            raise AssertionError("never called")

    def loudness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return samples.flatten(1).mean(1)

    with pytest.raises(ValueError, match="Needy scores the candidates of a search"):
        pruned(pipe, Prune((1,), (0.5,), 4, Needy()))
    with pytest.raises(ValueError, match=r"validated at noise levels .*, not at 0\.\d+: prune at one of these"):
        pruned(pipe, Prune((2,), (0.5,), 4, scorer_of(pipe)))
    with pytest.raises(
        ValueError, match=r"selects by 'reward', .*loudness, and the scorer was trained for .*ClipReward"
    ):
        pruned(pipe, Prune((1,), (0.5,), 4, scorer_of(pipe)), loudness)
    latent = scorer_of(pipe, LatentImageDistilled, channels=5, scale=4, width=4, depth=1)
    with pytest.raises(ValueError, match=r"reads latents \(B, 5, ...\), not \(4, 4, 16, 16\)"):
        pruned(pipe, Prune((1,), (0.5,), 4, latent))
