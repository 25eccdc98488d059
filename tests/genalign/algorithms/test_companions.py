"""Distribution matching and the latent proxy, against numbers worked by hand (fixtures F12 and F18)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from genalign.algorithms.companions import FakeScore, LatentProxy, LearnedFakeScore, proxy_loss
from genalign.algorithms.interfaces import MetricSums, UpdateContext, traits_of
from genalign.algorithms.latent_directions import DistributionMatching, ProxyAscent, WeightedAscent
from genalign.algorithms.pathwise import Ascent, PathwiseObjective
from genalign.algorithms.tails import OneStepEstimate
from genalign.diffusion.noise import seeded_noise
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.policy import Policy
from genalign.diffusion.transitions import ODE
from genalign.scoring.score import NamedReward
from genalign.types import Conditioning, NoiseLevel, Prompt
from pipelines import SD3
from tests.genalign.algorithms.gaussian_chain import MEAN, SPREAD, GaussianChain
from tests.genalign.algorithms.updates import update_batch, update_context

GENERATOR_SPREAD, GENERATOR_MEAN = 0.6, 0.2  # x = 0.6 z + 0.2
PAIRS = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
LATENTS = GENERATOR_SPREAD * PAIRS[:, :1] + GENERATOR_MEAN


class Moments(nn.Module):
    """The mean and spread of the Gaussian whose exact score is predicted; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([MEAN, SPREAD], dtype=torch.float64))

    def float(self) -> Moments:
        return self


class GaussianScores(GaussianChain):
    """A flow whose network is the exact one of a Gaussian of two weights: the teacher's are those of the data."""

    def __init__(self) -> None:
        super().__init__(FlowPath(), (1.0, 0.5))
        self.moments = Moments()
        self.denoiser = self.moments  # type: ignore[assignment]
        self.guidances = list[float]()

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning | None, guidance: float = 1.0) -> Tensor:
        self.guidances.append(guidance)
        mean, spread = self.moments.values
        alpha, sigma = (value.reshape(-1, 1) for value in (level.alpha, level.sigma))
        x0 = mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)
        return (x - x0) / sigma


@pytest.fixture
def gaussian(monkeypatch: pytest.MonkeyPatch) -> UpdateContext:
    """Every pair of a generated latent and a noise of -1 or 1, at sigma = 0.5, with the exact fake score."""
    toy = GaussianScores()
    policy = Policy(toy.denoiser, None)  # whose reference is the data's score
    with torch.no_grad():
        toy.moments.values.copy_(torch.tensor([GENERATOR_MEAN, GENERATOR_SPREAD], dtype=torch.float64))
    companion = LearnedFakeScore(FakeScore(), policy)
    monkeypatch.setattr("genalign.algorithms.latent_directions.seeded_noise", lambda seeds, like: PAIRS[:, 1:])
    half = torch.full((4,), 0.5, dtype=torch.float64)
    monkeypatch.setattr("genalign.algorithms.latent_directions.places", lambda *_: half)
    return UpdateContext(toy, policy, toy.grid(2), ODE(), 1.0, None, MetricSums(), [Prompt("a")], companion=companion)


def test_the_direction_of_distribution_matching(gaussian: UpdateContext) -> None:
    direction = DistributionMatching(guidance=4.0)(gaussian, LATENTS, [Prompt("a")] * 4, range(4))
    expected = [0.113122171946, -0.248281130634, -0.23153942428, -1.85121107266]  # of x0_fake - x0_real
    assert (-direction[:, 0]).tolist() == pytest.approx(expected, abs=1e-8)
    assert gaussian.pipeline.guidances == [1.0, 4.0]  # type: ignore[attr-defined]  # the fake score is not guided


def test_its_weighted_mean_is_the_gradient_of_the_divergence(gaussian: UpdateContext) -> None:
    """E[(alpha / sigma)^2 (x0_fake - x0_real) d x / d b] = (1 - t)^2 (b - m) / S_r, and the like for the spread."""
    fake, real = DistributionMatching().estimates(gaussian, LATENTS, [Prompt("a")] * 4, range(4))
    gap = (0.5 / 0.5) ** 2 * (fake - real)
    assert float(gap.mean()) == pytest.approx(-0.182926829268, abs=1e-8)
    assert float((gap * PAIRS[:, :1]).mean()) == pytest.approx(-0.0753228120516, abs=1e-8)


def test_a_fake_score_is_required(gaussian: UpdateContext) -> None:
    for direction in (DistributionMatching(), ProxyAscent()):
        with pytest.raises(ValueError, match="give the recipe the companion"):
            direction(replace(gaussian, companion=None), LATENTS, [Prompt("a")] * 4, range(4))


def test_a_fake_score_follows_the_samples_and_leaves_the_policy_alone(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    batch, policy = update_batch(context), context.policy
    companion = FakeScore(steps=20, learning_rate=1e-2)(tiny, policy, 0)
    before = [parameter.detach().clone() for parameter in policy.parameters]
    errors = []
    for _ in range(2):
        metrics = MetricSums()
        companion.update(replace(context, metrics=metrics), [batch], 4, seed=1)
        errors.append(metrics.mean("error"))
    assert errors[1] < errors[0]
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters, strict=True))
    assert all(parameter.grad is None for parameter in policy.parameters)
    assert not all(torch.equal(a, b) for a, b in zip(before, companion.weights.tensors, strict=True))


def test_the_loss_of_the_proxy() -> None:
    expert = torch.tensor([[0.9, 1.4, 0.3], [0.2, 0.1, 1.0]], dtype=torch.float64)
    scores = torch.tensor([[0.5, 0.6, 0.7], [0.1, 0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    loss = proxy_loss(expert, scores).mean()
    (gradient,) = torch.autograd.grad(loss, scores)
    assert float(loss.detach()) == pytest.approx(0.234555335881, abs=1e-10)
    assert gradient.flatten().tolist() == pytest.approx(
        [-0.0490050799077, -0.186359718398, 0.235364798306, 0.032786794679, 0.180102602114, -0.212889396793], abs=1e-10
    )


class Linear(nn.Module):
    """A proxy: a weighted sum of a latent's channels."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(channels))

    def forward(self, latents: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores: Tensor = latents.flatten(2).mean(2) @ self.weight
        return scores


def brightness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward without a gradient, 100 times as large as its differences would be."""
    return 100 * samples.detach().flatten(1).mean(1)


def test_a_proxy_learns_the_order_of_the_rewards(tiny: SD3) -> None:
    channels = tiny.latent_shape[0]
    context = update_context(tiny, ODE())
    companion = LatentProxy(lambda: Linear(channels), steps=20, learning_rate=1e-1)(tiny, context.policy, 0)
    assert isinstance(companion.network, Linear)
    same = LatentProxy(lambda: Linear(channels))(tiny, context.policy, 0).network
    assert torch.equal(same.weight, companion.network.weight)  # type: ignore[arg-type]  # from the seed
    batch, rewards = update_batch(context), [NamedReward("brightness", brightness)]
    losses = []
    for _ in range(2):
        metrics = MetricSums()
        prompts = [Prompt("a circle"), Prompt("two squares")]
        now = replace(context, metrics=metrics, rewards=rewards, prompts=prompts, memory=context.policy.snapshot())
        companion.update(now, [batch], 4, seed=1)
        losses.append(metrics.mean("loss"))
    assert losses[1] < losses[0]
    latents = seeded_noise([1, 2], torch.empty(2, *tiny.latent_shape))
    ascent = ProxyAscent()(replace(now, companion=companion), latents, prompts, [0, 1])
    pixels = latents[0, 0].numel()
    expected = (companion.network.weight / pixels).detach().view(-1, 1, 1).expand(tiny.latent_shape)
    torch.testing.assert_close(ascent, expected.expand_as(ascent))


def test_a_proxy_without_weights_is_refused(tiny: SD3) -> None:
    with pytest.raises(ValueError, match="the proxy Identity has no trainable weights"):
        LatentProxy(nn.Identity)(tiny, update_context(tiny, ODE()).policy, 0)


def test_the_traits_of_a_direction_are_those_of_its_objective() -> None:
    matching = PathwiseObjective(OneStepEstimate(), toward=DistributionMatching(3.0))
    assert (traits_of(matching).student_guidance, traits_of(matching).reward_gradients) == (3.0, False)
    both = replace(matching, further=(WeightedAscent(Ascent(), 0.1),))
    assert traits_of(both).reward_gradients and traits_of(both).through_sampler
    assert not traits_of(PathwiseObjective(OneStepEstimate(), toward=ProxyAscent())).reward_gradients


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="a fake score needs at least 1 step a round"):
        FakeScore(steps=0)
    with pytest.raises(ValueError, match="low and high must be ascending fractions"):
        DistributionMatching(low=0.9, high=0.1)
