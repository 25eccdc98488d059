"""Students of rewards: LoRA on the reward's own network; tests/genalign/cli/test_steer.py trains them by command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genalign.reward_learning.heads import MLPHead
from genalign.reward_learning.network import RewardEncoder
from genalign.reward_learning.noise_aware import Distillation, LevelQuality, PreviewDataset, RewardIdentity, distill
from genalign.reward_learning.reward_file import REWARD, RewardDescription, save_reward
from genalign.reward_learning.training import build_network
from genalign.search.noise_aware import NoiseAware, ScorerLevel
from genalign.types import Prompt, RewardFunction
from genalign.worlds.shapes import prompts, render_metadata
from rewards.aesthetic import AestheticReward
from rewards.backbones.clap_encoder import load_clap
from rewards.clap import ClapReward
from rewards.clip import ClipReward
from rewards.learned import LearnedReward
from rewards.learned_encoders import ClapTokens, ClipTokens
from rewards.noise_aware import LatentClapDistilled, SelfDistilled, load_scorer, save_scorer
from rewards.pickscore import PickScoreReward
from rewards.regressor import Regressor, RegressorReward
from rewards.shapes import ShapesReward
from tests.rewards import tiny_detectors
from tests.rewards.tiny_clap import RATE, write_clap

PROMPTS = [Prompt("an A4 sine tone"), Prompt("a C5 organ tone")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rewards")


def learned_reward(folder: Path, encoder: RewardEncoder) -> LearnedReward:
    """A reward by three members with random weights, less their deviation."""
    network, shape = build_network(encoder, MLPHead(8), 1, 3, 0), MLPHead(8)
    save_reward(folder / REWARD, network, RewardDescription.of(network, shape, ("overall",), centered=True), [])
    return LearnedReward(folder, pool="mean_minus_std")


@pytest.fixture(scope="module")
def rewards(folder: Path) -> dict[str, tuple[RewardFunction, Tensor]]:
    """Rewards on encoders of each kind, with samples for them."""
    generator = torch.Generator().manual_seed(0)
    images, clips = torch.rand(2, 3, 64, 64, generator=generator), torch.rand(2, 1, RATE, generator=generator) - 0.5
    clap, clip = str(write_clap(folder / "clap")), tiny_detectors.clip(folder / "clip")
    torch.manual_seed(0)
    Regressor("shapes-clip", hidden=8).save(folder / "images.safetensors")
    Regressor(clap, hidden=8, sample_rate=RATE).save(folder / "clips.safetensors")
    torch.save({"weight": torch.randn(1, 128), "bias": torch.zeros(1)}, folder / "head.pth")
    learned = {
        name: learned_reward(folder / name, encoder)
        for name, encoder in {"images": ClipTokens("shapes-clip"), "clips": ClapTokens(clap, RATE)}.items()
    }
    return {
        "open_clip": (ClipReward("shapes-clip"), images),
        "transformers": (PickScoreReward(clip, None), images),
        "aesthetic": (AestheticReward(str(folder / "head.pth"), "shapes-clip"), images),
        "clap": (ClapReward(clap, RATE), clips),
        "regressor": (RegressorReward(folder / "images.safetensors"), images),
        "regressor of sound": (RegressorReward(folder / "clips.safetensors"), clips),
        "learned": (learned["images"], images),
        "learned of sound": (learned["clips"], clips),
    }


@pytest.mark.parametrize(
    "name",
    [
        "open_clip",
        "transformers",
        "aesthetic",
        "clap",
        "regressor",
        "regressor of sound",
        "learned",
        "learned of sound",
    ],
)
def test_a_student_starts_as_its_reward_and_leaves_it_as_it_is(
    name: str, rewards: dict[str, tuple[RewardFunction, Tensor]]
) -> None:
    reward, samples = rewards[name]
    before = reward(samples, PROMPTS)
    student = SelfDistilled(reward, lora_rank=2)
    torch.testing.assert_close(student(samples, PROMPTS), before)  # attention has a kernel of its own without gradients
    trainable = [weight for weight in student.parameters() if weight.requires_grad]
    assert len(trainable) == 2 * len(student.names)  # of the LoRA alone
    optimizer = torch.optim.Adam(trainable, lr=1e-3)
    for _ in range(2):  # the first step moves only one of two factors
        optimizer.zero_grad()
        student(samples, PROMPTS).sum().backward()
        optimizer.step()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in student.up)
    assert float(student(samples, PROMPTS).sum().detach()) < float(before.sum())
    assert torch.equal(reward(samples, PROMPTS), before)
    own = {weight.data_ptr() for weight in student.network.parameters()}
    assert all(weight.data_ptr() in own for weight in reward.network().parameters())  # held once


def test_attention_of_open_clip_is_adapted_too() -> None:
    names = SelfDistilled(ClipReward("shapes-clip"), lora_rank=2).names
    assert {name.split(".resblocks.0.")[1] for name in names if ".resblocks.0." in name} == {
        "attn.in_proj_weight",
        "attn.out_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    assert all("visual" in name for name in names)


@pytest.mark.slow
def test_a_student_learns_the_clean_reward_of_noisy_samples() -> None:
    rng, reward = np.random.default_rng(0), ClipReward("shapes-clip")
    texts = prompts("iid").prompts[:200:25]
    metadata = [prompt.metadata for prompt in texts for _ in range(6)]
    images = render_metadata(metadata, rng)
    row = torch.arange(len(texts)).repeat_interleave(6)
    clean = reward(images, [texts[p] for p in row.tolist()]).detach()
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    dataset = PreviewDataset(noisy[:, None].half(), torch.tensor([0.5]), row, clean, texts)
    torch.manual_seed(0)
    student = SelfDistilled(reward, lora_rank=4)
    settings = Distillation(epochs=8, batch_size=24, learning_rate=3e-3)
    texts_of_all = [texts[p] for p in row.tolist()]

    def error() -> float:
        with torch.no_grad():
            return float((student(noisy, texts_of_all) - clean).square().mean())

    before = error()
    (level,) = distill(student, dataset, nn.Identity(), settings)
    assert error() < 0.5 * before
    assert set(level.weights) == {name for name, weight in student.named_parameters() if weight.requires_grad}


def test_a_reward_without_a_network_is_refused() -> None:
    with pytest.raises(ValueError, match="ShapesReward has no network that could be trained into a student"):
        SelfDistilled(ShapesReward())


def test_a_scorer_survives_a_round_trip_and_keeps_its_reward(
    rewards: dict[str, tuple[RewardFunction, Tensor]], tmp_path: Path
) -> None:
    reward, _ = rewards["clap"]
    student = SelfDistilled(reward, lora_rank=2)
    weights = {name: torch.rand_like(weight) for name, weight in student.named_parameters() if weight.requires_grad}
    level = ScorerLevel(LevelQuality(0.2, 0.5, 0.5, 0.0), weights)
    scorer = NoiseAware(SelfDistilled, "samples", (level,), RewardIdentity.of(reward))
    path = tmp_path / "scorer.safetensors"
    save_scorer(path, scorer, student)
    again = load_scorer(path, least_tau=0.3)
    assert again.reward == scorer.reward and again.least_tau == 0.3
    assert again.levels[0].quality == level.quality
    assert all(torch.equal(again.levels[0].weights[name], weight) for name, weight in weights.items())
    made = again.make_student(reward)
    assert isinstance(made, SelfDistilled) and made.arguments == student.arguments
    with pytest.raises(ValueError, match=r"Linear is not a class of rewards\.noise_aware"):
        save_scorer(path, scorer, nn.Linear(1, 1))


def test_the_fingerprint_tells_the_scores_of_a_learned_reward_apart(tmp_path: Path) -> None:
    network = build_network(ClipTokens("shapes-clip"), MLPHead(8), 2, 2, 0)
    save_reward(tmp_path / REWARD, network, RewardDescription.of(network, MLPHead(8), ("a", "b"), centered=True), [])
    scores = LearnedReward(tmp_path), LearnedReward(tmp_path, "b"), LearnedReward(tmp_path, pool="min")
    assert len({RewardIdentity.of(score).digest for score in scores}) == 3
    assert RewardIdentity.of(LearnedReward(tmp_path, "a")) == RewardIdentity.of(scores[0])


def test_the_fingerprint_tells_regressors_apart(
    folder: Path, rewards: dict[str, tuple[RewardFunction, Tensor]]
) -> None:
    torch.manual_seed(1)
    Regressor("shapes-clip", hidden=8).save(folder / "retrained.safetensors")
    first, other = rewards["regressor"][0], RegressorReward(folder / "retrained.safetensors")
    assert RewardIdentity.of(first) != RewardIdentity.of(other)
    assert RewardIdentity.of(first).path == RewardIdentity.of(other).path


@pytest.mark.parametrize("name", ["clap", "regressor of sound", "learned of sound"])
def test_a_student_of_audio_latents_uses_its_own_decoder(
    name: str, rewards: dict[str, tuple[RewardFunction, Tensor]]
) -> None:
    reward, clips = rewards[name]
    student = LatentClapDistilled(reward, channels=3, sample_rate=RATE, width=4, depth=1, lora_rank=2)
    latents = torch.randn(2, 3, 20)
    spectra = student.decoder_target(clips)
    assert student.decoder(latents).shape == spectra.shape
    student.decoder.forward = lambda latents: spectra  # an exact decoder
    torch.testing.assert_close(student(latents, PROMPTS), reward(clips, PROMPTS))
    with pytest.raises(ValueError, match="takes clips of 1 s, and the model generates 2 s: use SelfDistilled"):
        student.decoder_target(torch.zeros(2, 1, 2 * RATE))
    with pytest.raises(ValueError, match="this student is of a reward on CLAP"):
        LatentClapDistilled(ClipReward("shapes-clip"), channels=3, sample_rate=RATE)


def test_training_moves_no_batch_statistics(rewards: dict[str, tuple[RewardFunction, Tensor]]) -> None:
    reward, clips = rewards["clap"]
    encoder = load_clap(reward.model)
    statistics = {name: tensor.clone() for name, tensor in encoder.named_buffers() if "running" in name}
    student = SelfDistilled(reward, lora_rank=2)
    student(clips, PROMPTS).sum().backward()
    own = dict(student.network.encoder.named_buffers())
    assert statistics and all(torch.equal(own[name], tensor) for name, tensor in statistics.items())
