from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from genalign.reward_learning.adversarial_losses import (
    adversarial_loss,
    between_pairs,
    gradient_norms,
    pair_accuracy,
)
from genalign.runtime.files import load_state, save_state
from genalign.types import Prompt, TrainableReward
from rewards.adversarial import AccuracyBand, AdversarialReward, Adversary, Overtake, PatchWeights, Ratio
from rewards.adversarial.adversary import DiscriminatorSettings, FeatureScorer
from rewards.adversarial.discriminator_heads import mlp_head
from rewards.adversarial.replay_buffer import ReplayBuffer, SampleBatch
from rewards.adversarial.tuned_clip import TunedClipReward
from rewards.adversarial.update_rules import DiscriminatorStatus
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.encoders import Features
from rewards.backbones.reference_images import ImageTensor, ReferencePool, ReferencesByPrompt
from rewards.clip import ClipReward
from tests.packages import ROOT

RED, BLUE = Prompt("a red circle", {"tag": "single_object"}), Prompt("a blue ring")
NEVER = Overtake(1e9)
FAST = DiscriminatorSettings(learning_rate=1e-2, steps_per_update=5, batch_size=16, replay=24)


def noise(count: int, level: float, seed: int) -> Tensor:
    """Images (count, 3, 4, 4) around a grey level."""
    generator = torch.Generator().manual_seed(seed)
    return (level + 0.1 * torch.randn(count, 3, 4, 4, generator=generator)).clamp(0, 1)


def flat(images: Tensor) -> Tensor:
    """The plainest features: the pixels."""
    return images.flatten(1)


class Pixels:
    """Global features: mean colour; patches: the 16 pixels."""

    def __call__(self, samples: Tensor) -> Tensor:
        return self.features(samples).global_

    def features(self, samples: Tensor) -> Features:
        pixels = samples.flatten(2).transpose(1, 2)
        return Features(pixels.mean(1), pixels)


REFERENCES = ReferencePool(ImageTensor(noise(40, 0.7, 0)))
FAKES, PROMPTS = noise(20, 0.3, 1), [RED, BLUE] * 10
GLOBAL = PatchWeights(1.0, 0.0)
LOCAL = PatchWeights(n_patches=5)


def reward(learning: DiscriminatorSettings = FAST, **options: object) -> AdversarialReward:
    return AdversarialReward(Pixels(), REFERENCES, **({"weights": LOCAL, "learning": learning} | options))


def status(**changes: float) -> DiscriminatorStatus:
    return replace(DiscriminatorStatus(0, 0.0, 0.0, 0.5, 1.0, True), **changes)


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([0.5, -3.0])
    assert adversarial_loss("hinge", real, fake).tolist() == [0.5 + 1.5, 0.0]
    preferred = -torch.stack([real, fake]).softmax(0)[0].log()
    torch.testing.assert_close(adversarial_loss("bt_pairwise", real, fake), preferred)
    assert pair_accuracy("hinge", real, fake).tolist() == [0.5, 1.0]
    assert pair_accuracy("bt_pairwise", real, fake).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="come in pairs"):
        adversarial_loss("hinge", real, fake[:1])


def test_the_penalty_of_a_linear_head_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)  # of norm 3
    between = between_pairs(real, fake, torch.tensor([0.0, 1.0, 0.25, 0.5]))
    torch.testing.assert_close(between[:3], torch.stack([fake[0], real[1], 0.25 * real[2] + 0.75 * fake[2]]))
    norms = gradient_norms(between @ direction + 7.0, between)
    torch.testing.assert_close(norms, torch.full((4, 5), 3.0, dtype=torch.float64), rtol=0, atol=1e-12)
    squares = gradient_norms(between.square().sum((1, 2)), between)  # of whole samples: the gradient is 2 x
    torch.testing.assert_close(squares, 2 * between.flatten(1).norm(dim=1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"between references \(5, 3\) and samples \(4, 3\): give the references"):
        between_pairs(real, fake[:, :4], torch.ones(4))


def test_a_step_follows_the_gradient_of_the_penalty() -> None:
    """A linear head that satisfies every margin of the hinge has no other gradient."""
    head = nn.Linear(48, 1)
    nn.init.constant_(head.weight, 0.5)
    nn.init.constant_(head.bias, -12.0)
    learning = replace(FAST, steps_per_update=1, gradient_penalty=10.0, gradient_target=2.0)
    trained = AdversarialReward(flat, REFERENCES, head, GLOBAL, learning=learning)
    steps: list[Sequence[Tensor]] = []
    trained.fitter.apply = lambda gradients: steps.append(gradients) or torch.zeros(())  # type: ignore[method-assign]
    metrics = trained.update(FAKES, PROMPTS)
    norm = 0.5 * math.sqrt(48)
    assert metrics["saturated"] == 1 and metrics["gradient_norm"] == pytest.approx(norm, rel=1e-6)
    ((weight, bias),) = steps
    torch.testing.assert_close(weight, torch.full((1, 48), 10.0 * 2 * (norm - 2.0) * 0.5 / norm), rtol=1e-5, atol=0)
    assert bias.tolist() == [0.0]
    plain = AdversarialReward(flat, REFERENCES, head, GLOBAL, learning=replace(learning, gradient_penalty=0.0))
    assert "gradient_norm" not in plain.update(FAKES, PROMPTS)


@pytest.mark.parametrize("loss", ["hinge", "bt_pairwise"])
def test_the_penalty_bounds_a_discriminator_that_saturates(loss: str) -> None:
    steep, bounded = (
        reward(replace(FAST, loss=loss, learning_rate=3e-2, gradient_penalty=weight, gradient_target=0.5))
        for weight in (0.0, 10.0)
    )
    for trained in (steep, bounded):
        for _ in range(8):
            metrics = trained.update(FAKES, PROMPTS)
    assert metrics["gradient_norm"] == pytest.approx(0.5, abs=0.2) and metrics["gap"] < -0.15

    def steepest(trained: AdversarialReward) -> float:
        points = torch.rand(500, 1, 3, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
        assert isinstance(trained.scorer, FeatureScorer)
        return float(gradient_norms(trained.scorer.logits(points), points).detach().max())

    assert steepest(bounded) < 1.0 and steepest(steep) > 2 * steepest(bounded)


def test_the_penalty_is_of_samples_where_there_are_no_features() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3, 4, 4), 2.0))

        def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return (images * self.weight).flatten(1).sum(1)

    learning = replace(FAST, loss="bt_pairwise", gradient_penalty=1.0)
    trained = Adversary(Linear(), REFERENCES, NEVER, learning, scale=0.5)
    assert trained.update(FAKES, PROMPTS)["gradient_norm"] == pytest.approx(0.5 * 2 * 48**0.5, rel=1e-5)
    with pytest.raises(ValueError, match="not differentiable in its samples: set gradient_penalty to 0"):
        Adversary(Wide(16), REFERENCES, NEVER, learning).update(FAKES[:16], PROMPTS[:16])


def test_a_penalized_run_resumes_exactly() -> None:
    learning = replace(FAST, gradient_penalty=10.0)
    whole, second = reward(learning), reward(learning, head=mlp_head(3, seed=99))
    whole.update(FAKES, PROMPTS)
    second.load_tensors(whole.tensors())
    assert whole.update(FAKES, PROMPTS) == second.update(FAKES, PROMPTS)
    assert torch.equal(whole(FAKES, PROMPTS), second(FAKES, PROMPTS))


@pytest.mark.parametrize("loss", ["hinge", "bt_pairwise"])
def test_learns_to_tell_references_from_samples(loss: str) -> None:
    trained = reward(replace(FAST, loss=loss))
    assert isinstance(trained, TrainableReward)
    metrics = [trained.update(FAKES, PROMPTS) for _ in range(12)]
    assert metrics[-1]["accuracy"] > 0.95
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[-1]["gap"] < metrics[0]["gap"] - 1
    assert metrics[-1]["gap"] == pytest.approx(metrics[-1]["generated"] - metrics[-1]["reference"])
    assert trained(noise(20, 0.7, 9), PROMPTS).mean() > trained(FAKES, PROMPTS).mean() + 1


def test_overtake_trains_only_when_generated_samples_lead() -> None:
    trained = reward(update_rule=Overtake())
    first = trained.update(noise(20, 0.3, 1), PROMPTS)
    assert first["updated"] == float(first["gap"] > 0)
    ahead = noise(20, 0.3 if first["gap"] > 0 else 1.0, 2)
    while trained.update(ahead, PROMPTS)["gap"] > 0:
        assert trained.version <= 40
    version = trained.version
    assert trained.update(ahead, PROMPTS)["updated"] == 0 and trained.version == version
    assert Overtake(0.5)(status(generated=0.6)) and not Overtake(0.5)(status(generated=0.4))
    assert not Overtake()(status())


def test_ratio_alternates() -> None:
    trained = reward(update_rule=Ratio(2, 3))
    assert [trained.update(FAKES, PROMPTS)["updated"] for _ in range(7)] == [1, 1, 0, 0, 0, 1, 1]
    assert trained.version == 4
    assert all(Ratio()(status(round=i)) for i in range(5))


def test_accuracy_band_waits_to_fall_through() -> None:
    rule, training, decisions = AccuracyBand(0.6, 0.9), True, []
    for accuracy in (0.5, 0.8, 0.95, 0.8, 0.7, 0.5, 0.8):
        training = rule(status(accuracy=accuracy, training=training))
        decisions.append(training)
    assert decisions == [True, True, False, False, False, True, True]


def test_a_round_is_scored_by_one_snapshot() -> None:
    trained = reward()
    before, version = trained(FAKES, PROMPTS), trained.version
    with torch.no_grad():
        for parameter in trained.scorer.parameters():
            parameter.add_(1.0)
    assert torch.equal(trained(FAKES, PROMPTS), before) and trained.version == version == 0
    trained.update(FAKES, PROMPTS)
    assert trained.version == 1 and not torch.equal(trained(FAKES, PROMPTS), before)


def test_a_refused_update_changes_no_score() -> None:
    trained = reward(update_rule=NEVER)
    before = trained(FAKES, PROMPTS)
    metrics = trained.update(FAKES, PROMPTS)
    assert torch.equal(trained(FAKES, PROMPTS), before)
    assert (metrics["updated"], metrics["version"], metrics["replay"]) == (0, 0, 20)


def test_patches_are_fixed_by_the_snapshot_and_the_seed() -> None:
    def patches(seed: int) -> list[int]:
        return LOCAL(17, torch.Generator().manual_seed(seed)).nonzero().flatten().tolist()

    weights = LOCAL(17, torch.Generator().manual_seed(0))
    assert weights[0] == pytest.approx(0.7) and weights.sum() == pytest.approx(1.0)
    assert len(patches(0)) == 6 and patches(0) == patches(0) != patches(1)
    trained = reward()
    assert torch.equal(trained(FAKES, PROMPTS), trained(FAKES, PROMPTS))
    assert torch.equal(trained(FAKES, PROMPTS), reward()(FAKES, PROMPTS))
    # A pixel that is left out by the snapshot is seen by the global feature alone, so all left-out ones count the same.
    leaf = FAKES[:1].clone().requires_grad_(True)
    trained(leaf, PROMPTS[:1]).sum().backward()
    assert leaf.grad is not None
    steepness = leaf.grad.flatten(2)[0].norm(dim=0)
    assert ((steepness - steepness.median()).abs() > 1e-6).sum() == 5


def test_score_and_loss_use_the_paper_weights() -> None:
    trained = reward(replace(FAST, batch_size=64))
    with torch.no_grad():
        logits = trained.scorer(FAKES, PROMPTS)
    assert logits.shape == (20, 17)
    weights = trained._weights(logits)
    picked = (weights > 0).nonzero().flatten()[1:]
    expected = 0.7 * logits[:, 0] + 0.3 * logits[:, picked].mean(1)
    torch.testing.assert_close(trained(FAKES, PROMPTS), expected, rtol=0, atol=1e-6)
    real = logits.flip(0)
    by_term = adversarial_loss("hinge", real, logits)
    expected = 0.7 * by_term[:, 0] + 0.3 * by_term[:, picked].mean(1)
    torch.testing.assert_close(trained._losses(real, logits), expected, rtol=0, atol=1e-6)


def test_replay_is_first_in_first_out() -> None:
    replay = ReplayBuffer(5)
    for start in (0, 3, 6):
        samples = torch.arange(start, start + 3).float()[:, None]
        replay.push(SampleBatch(samples, tuple(Prompt(str(i)) for i in range(start, start + 3))))
    assert replay.stored is not None
    assert replay.stored.samples.flatten().tolist() == [4, 5, 6, 7, 8]
    assert [prompt.text for prompt in replay.stored.prompts] == ["4", "5", "6", "7", "8"]
    drawn = replay.draw(9, torch.Generator().manual_seed(0))
    assert drawn is not None and sorted(drawn.samples.flatten().tolist()) == [4, 5, 6, 7, 8]
    assert [float(prompt.text) for prompt in drawn.prompts] == drawn.samples.flatten().tolist()
    with pytest.raises(ValueError, match=r"samples were \(1,\) and are now \(2,\)"):
        replay.push(SampleBatch(torch.zeros(1, 2), (RED,)))
    nothing = ReplayBuffer(0)
    nothing.push(SampleBatch(torch.zeros(1, 2), (RED,)))
    assert len(nothing) == 0 and nothing.draw(3, torch.Generator()) is None


def test_replayed_images_have_the_bits_of_pictures() -> None:
    replay, images = ReplayBuffer(5), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    replay.push(SampleBatch(images, (RED,) * 4))
    assert replay.tensors()["samples"].nbytes == images.numel()
    drawn = replay.draw(4, torch.Generator().manual_seed(0))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    assert drawn is not None and drawn.samples.dtype == torch.float32
    torch.testing.assert_close(drawn.samples, images[order], rtol=0, atol=0.5 / 255 + 1e-6)


def test_replay_keeps_prompts_through_tensors() -> None:
    replay, again = ReplayBuffer(5), ReplayBuffer(5)
    replay.push(SampleBatch(torch.rand(2, 4), (RED, Prompt("日本 'quoted'"))))
    again.load_tensors(replay.tensors())
    assert replay.stored is not None and again.stored is not None
    assert again.stored.prompts == replay.stored.prompts
    assert [p.metadata for p in again.stored.prompts] == [p.metadata for p in replay.stored.prompts]
    assert torch.equal(again.stored.samples, replay.stored.samples) and again.stored.held == replay.stored.held
    again.load_tensors(ReplayBuffer(5).tensors())
    assert len(again) == 0


def test_a_step_mixes_fresh_and_old_samples() -> None:
    trained = reward(replace(FAST, fresh=0.75), update_rule=NEVER)
    fresh = SampleBatch(torch.full((20, 3, 4, 4), 0.75), tuple(PROMPTS))
    assert len(trained._mixed_with_replay(fresh, torch.Generator())) == 16
    trained.update(torch.full((20, 3, 4, 4), 0.25), PROMPTS)
    mixed = trained._mixed_with_replay(fresh, torch.Generator())
    assert len(mixed) == 16 and (mixed.samples[:, 0, 0, 0] == 0.75).sum() == 12
    assert ((mixed.samples[:, 0, 0, 0] - 0.25).abs() < 1 / 255).sum() == 4  # of 8 bits
    assert trained._mixed_with_replay(fresh.rows([0]), torch.Generator()).samples.mean() == 0.75


def test_bfloat16_features_leave_a_moving_float32_head() -> None:
    learning = replace(FAST, learning_rate=1e-5)
    head = mlp_head(48, 32).to(torch.bfloat16)
    trained = AdversarialReward(
        lambda images: flat(images).to(torch.bfloat16), REFERENCES, head, GLOBAL, learning=learning
    )
    before = {name: tensor.clone() for name, tensor in trained.snapshot.weights.items()}
    trained.update(FAKES, PROMPTS)
    assert trained(FAKES, PROMPTS).dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in trained.snapshot.weights.values())
    slots = [value for state in trained.optimizer.state.values() for value in state.values()]
    assert slots and all(slot.dtype == torch.float32 for slot in slots)
    moved = (trained.snapshot.weights["head.0.weight"] - before["head.0.weight"]).abs()
    assert (moved > 1e-6).float().mean() > 0.9
    assert head[0].weight.dtype == torch.bfloat16  # the caller's head is left alone


def test_resume_is_exact(tmp_path: Path) -> None:
    rounds = [noise(20, 0.3 + 0.02 * i, 10 + i) for i in range(6)]
    learning = replace(FAST, loss="bt_pairwise")
    whole = reward(learning, update_rule=Ratio(2, 1))
    metrics = [whole.update(samples, PROMPTS) for samples in rounds]
    first = reward(learning, update_rule=Ratio(2, 1))
    for samples in rounds[:3]:
        first.update(samples, PROMPTS)
    save_state(tmp_path / "state.safetensors", first.tensors(), {})
    second = reward(learning, update_rule=Ratio(2, 1), head=mlp_head(3, seed=99))
    second.load_tensors(load_state(tmp_path / "state.safetensors")[0])
    assert torch.equal(second(FAKES, PROMPTS), first(FAKES, PROMPTS)) and second.version == first.version == 2
    assert [second.update(samples, PROMPTS) for samples in rounds[3:]] == metrics[3:]
    ours, theirs = second.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(second(FAKES, PROMPTS), whole(FAKES, PROMPTS))


def test_a_checkpoint_of_before_the_first_update(tmp_path: Path) -> None:
    fresh, used = reward(), reward()
    used.update(FAKES, PROMPTS)
    used.load_tensors(fresh.tensors())
    assert used.update(FAKES, PROMPTS) == fresh.update(FAKES, PROMPTS)
    with pytest.raises(ValueError, match="this checkpoint is of another adversarial reward"):
        used.load_tensors(reward(head=mlp_head(3, hidden=8)).tensors())


def test_tensors_are_copies() -> None:
    trained, other = reward(), reward(head=mlp_head(3, seed=1))
    trained.update(FAKES, PROMPTS)
    saved = trained.tensors()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    other.load_tensors(saved)
    for each in (trained, other):
        each.update(FAKES, PROMPTS)
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_saturation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Level(nn.Module):
        """Far above every margin from the start."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(50.0))

        def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return self.gain * (images.flatten(1).mean(1) - 0.5)

    trained = Adversary(Level(), REFERENCES, Ratio(), FAST)
    assert trained.update(FAKES, PROMPTS)["saturated"] == 1
    assert "satisfies every margin" in caplog.text and "AccuracyBand" in caplog.text
    assert trained.snapshot.weights["gain"] == 50
    assert trained.update(noise(20, 0.5, 3), PROMPTS)["saturated"] == 0


def test_any_module_can_be_trained() -> None:
    """A preference that is hacked by brightness unlearns its taste for it."""

    class Hackable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taste = nn.Parameter(torch.tensor(2.0))
            self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)

        def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return self.frozen * images[:, 0].flatten(1).std(1) + self.taste * images.flatten(1).mean(1)

    hacked = noise(20, 0.95, 5)
    trained = Adversary(Hackable(), REFERENCES, Overtake(), replace(FAST, loss="bt_pairwise", learning_rate=0.05))
    first = trained.update(hacked, PROMPTS)
    for _ in range(20):
        last = trained.update(hacked, PROMPTS)
    assert first["gap"] > 0.3 and last["updated"] == 0 and last["gap"] <= 0
    assert set(trained.snapshot.weights) == {"taste"} and trained.snapshot.weights["taste"] < 0.5


def test_features_that_are_a_module_are_not_trained() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    before = backbone[1].weight.detach().clone()
    trained = AdversarialReward(backbone, REFERENCES, weights=GLOBAL, learning=FAST)
    trained.update(FAKES, PROMPTS)
    assert torch.equal(backbone[1].weight, before) and backbone[1].weight.grad is None
    assert all(name.startswith("head.") for name in trained.snapshot.weights)


def test_scores_are_differentiable_in_the_samples() -> None:
    leaf = FAKES.clone().requires_grad_(True)
    trained = reward()
    trained(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None and (leaf.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in trained.scorer.parameters())


def test_broken_samples_score_nan_and_are_not_learnt() -> None:
    broken = FAKES.clone()
    broken[3, 0, 0, 0] = torch.nan
    trained = reward()
    assert trained(broken, PROMPTS).isnan().nonzero().flatten().tolist() == [3]
    metrics = trained.update(broken, PROMPTS)
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["replay"] == 19
    assert all(tensor.isfinite().all() for tensor in trained.snapshot.weights.values())
    with pytest.raises(ValueError, match="no sample of this round is finite"):
        trained.update(torch.full_like(FAKES, torch.nan), PROMPTS)


def test_misfits_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"these features have no patches: .*PatchWeights\(1\.0, 0\.0\)"):
        AdversarialReward(flat, REFERENCES)
    with pytest.raises(ValueError, match="n_patches is 64, but the features have 16 patches"):
        AdversarialReward(Pixels(), REFERENCES)
    with pytest.raises(ValueError, match=r"the head maps features \(1, 1, 48\) to \(1, 1, 2\).* one output"):
        AdversarialReward(flat, REFERENCES, nn.Linear(48, 2), GLOBAL)
    with pytest.raises(ValueError, match=r"features must be \(B, d\)"):
        AdversarialReward(lambda images: images, REFERENCES, weights=GLOBAL)
    with pytest.raises(ValueError, match="nothing to train"):
        Adversary(nn.Linear(2, 1).requires_grad_(False), REFERENCES, Ratio(), FAST)
    with pytest.raises(ValueError, match="20 samples have 3 prompts"):
        reward()(FAKES, PROMPTS[:3])


class Wide(nn.Module):
    """Gives what ``shape`` says."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(shape))

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.logits


def test_scorers_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="gives 2 logits per sample"):
        Adversary(Wide(4, 2), REFERENCES, Ratio(), FAST)(FAKES[:4], PROMPTS[:4])
    with pytest.raises(ValueError, match=r"must give \(B,\) or \(B, m\) for 4 samples, not \(3,\)"):
        Adversary(Wide(3), REFERENCES, Ratio(), FAST)(FAKES[:4], PROMPTS[:4])


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (DiscriminatorSettings, {"loss": "wasserstein"}, "loss must be"),
        (DiscriminatorSettings, {"fresh": 0.0}, "fresh is the fraction"),
        (DiscriminatorSettings, {"steps_per_update": 0}, "steps_per_update and batch_size must be at least 1"),
        (DiscriminatorSettings, {"learning_rate": 0.0}, "learning_rate positive"),
        (PatchWeights, {"global_weight": 0.0, "local_weight": 0.0}, "nor both 0"),
        (PatchWeights, {"n_patches": 0}, "local_weight=0 leaves patches out"),
        (Ratio, {"discriminator": 0, "generator": 1}, "discriminator must be at least 1"),
        (AccuracyBand, {"low": 0.9, "high": 0.6}, "0 <= low <= high <= 1"),
        (
            DiscriminatorSettings,
            {"gradient_penalty": -1.0},
            "gradient_penalty and gradient_target must not be negative",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**arguments)


CLIP_PROMPTS = [Prompt("red circle"), Prompt("blue ring")] * 2
CLIP_REFERENCES = ReferencesByPrompt(
    ImageTensor(torch.cat([noise(2, 0.7, 6), noise(2, 0.7, 7)])), ["red circle"] * 2 + ["blue ring"] * 2
)
CLIP_FAKES = noise(4, 0.3, 8)
TUNING = DiscriminatorSettings(loss="bt_pairwise", learning_rate=1e-3, steps_per_update=3, batch_size=8, replay=8)


def test_tuned_clip_starts_as_clip_and_learns_to_prefer_references() -> None:
    trained, plain = (
        TunedClipReward("shapes-clip", CLIP_REFERENCES, 2, None, Ratio(), TUNING),
        ClipReward("shapes-clip"),
    )
    start = plain(CLIP_FAKES, CLIP_PROMPTS)
    torch.testing.assert_close(trained(CLIP_FAKES, CLIP_PROMPTS), start, rtol=0, atol=1e-6)
    metrics = [trained.update(CLIP_FAKES, CLIP_PROMPTS) for _ in range(3)]
    assert metrics[-1]["gap"] < metrics[0]["gap"] - 0.05 and metrics[-1]["loss"] < metrics[0]["loss"]
    assert torch.equal(plain(CLIP_FAKES, CLIP_PROMPTS), start)  # the shared model is untouched
    blocks = load_clip("shapes-clip").blocks
    assert len(trained.snapshot.weights) == sum(len(list(block.parameters())) for block in blocks[-2:])


def test_a_prompt_without_references_is_named_before_a_round() -> None:
    tuned = TunedClipReward("shapes-clip", CLIP_REFERENCES, 1)
    tuned.require_references(CLIP_PROMPTS[0])
    with pytest.raises(ValueError, match="there is no reference for the prompt 'two squares'"):
        tuned.require_references(Prompt("two squares"))


def test_the_penalty_of_a_tuned_clip_is_of_its_samples() -> None:
    """Without it the cosine becomes steeper between samples and references, and with it flatter."""
    between = between_pairs(CLIP_REFERENCES.images.load(range(4)), CLIP_FAKES, torch.full((4,), 0.5))
    prompts = [Prompt("red circle")] * 2 + [Prompt("blue ring")] * 2

    def steepness(penalty: float, rounds: int) -> float:
        learning = replace(TUNING, gradient_penalty=penalty)
        trained = TunedClipReward("shapes-clip", CLIP_REFERENCES, 1, None, Ratio(), learning)
        for _ in range(rounds):
            trained.update(CLIP_FAKES, CLIP_PROMPTS)
        return float(gradient_norms(trained(between, prompts), between).detach().mean())

    assert steepness(10.0, 1) < 0.95 * steepness(0.0, 0) < steepness(0.0, 1)


def test_tuned_clip_trains_on_overtaking_only() -> None:
    trained = TunedClipReward("shapes-clip", CLIP_REFERENCES, 1, learning=replace(TUNING, steps_per_update=1))
    metrics = [trained.update(samples, CLIP_PROMPTS) for samples in (CLIP_FAKES, noise(4, 0.5, 9))]
    assert [r["updated"] for r in metrics] == [float(r["gap"] > 0) for r in metrics]


def test_tuned_clip_resumes_exactly() -> None:
    def trained() -> TunedClipReward:
        return TunedClipReward("shapes-clip", CLIP_REFERENCES, 1, None, Ratio(), replace(TUNING, steps_per_update=1))

    whole, second = trained(), trained()
    whole.update(CLIP_FAKES, CLIP_PROMPTS)
    second.load_tensors(whole.tensors())
    assert whole.update(CLIP_FAKES, CLIP_PROMPTS) == second.update(CLIP_FAKES, CLIP_PROMPTS)
    assert torch.equal(whole(CLIP_FAKES, CLIP_PROMPTS), second(CLIP_FAKES, CLIP_PROMPTS))


RANK = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from genalign.types import Prompt
from tests.rewards.adversarial.test_adversarial import two_by_two

PROMPTS = [Prompt(str(i)) for i in range(8)]

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
reward, samples = two_by_two()
rows = [[0, 1, 4, 6, 7], [2, 3, 5]][rank]
sent = []
for name in ("all_reduce", "gather"):
    plain = getattr(dist, name)
    setattr(dist, name, lambda tensor, *rest, plain=plain: (sent.append(tensor.nbytes), plain(tensor, *rest)))
metrics = [reward.update(samples[rows], PROMPTS, rows) for _ in range(2)]
traffic = torch.tensor(sum(sent))
tensors = reward.tensors()
again, _ = two_by_two()
if rank:
    tensors = {}
dist.barrier()
save_file({**tensors, "gap": torch.tensor(metrics[1]["gap"]), "traffic": traffic}, f"{folder}/{rank}.safetensors")
dist.barrier()
whole = load_file(f"{folder}/0.safetensors")
again.load_tensors(whole)
assert again.update(samples[rows], PROMPTS, rows) == reward.update(samples[rows], PROMPTS, rows)
assert all(torch.equal(tensor, reward.snapshot.weights[name]) for name, tensor in again.snapshot.weights.items())
save_file(dict(reward.snapshot.weights), f"{folder}/{rank}-end.safetensors")
dist.destroy_process_group()
"""


def two_by_two() -> tuple[AdversarialReward, Tensor]:
    """Return a reward of images of 2 x 2 pixels and 8 such images."""
    learning = DiscriminatorSettings(learning_rate=1e-2, steps_per_update=3, batch_size=5, replay=6)
    references = ReferencePool(ImageTensor(torch.full((1, 3, 2, 2), 0.9)))
    reward = AdversarialReward(flat, references, weights=GLOBAL, learning=learning)
    return reward, torch.linspace(0, 0.5, 8 * 12).view(8, 3, 2, 2)


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        command = [sys.executable, "-c", RANK, str(rank), str(tmp_path)]
        subprocess.run(command, cwd=ROOT, timeout=300, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    first, second = (load_file(tmp_path / f"{rank}-end.safetensors") for rank in range(2))
    saved, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone, samples = two_by_two()
    prompts = [Prompt(str(i)) for i in range(8)]
    metrics = [alone.update(samples, prompts) for _ in range(2)]
    expected = alone.tensors()
    assert torch.equal(saved["replay.samples"], expected["replay.samples"])
    assert torch.equal(saved["replay.prompts"], expected["replay.prompts"])
    assert saved["replay.ranks"].tolist() == [1, 1, 0, 1, 0, 0] and saved["replay.samples"].dtype == torch.uint8
    assert float(saved["gap"]) == float(other["gap"]) == pytest.approx(metrics[1]["gap"], abs=1e-6)
    alone.update(samples, prompts)
    for name, tensor in alone.snapshot.weights.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5)
    # Gradients, five sums, and which samples are finite are sent, and no sample
    steps = sum(parameter.nbytes for parameter in alone.trained.values()) * alone.learning.steps_per_update
    assert int(saved["traffic"]) == int(other["traffic"]) == 2 * (steps + 5 * 8 + 8 * 8)
