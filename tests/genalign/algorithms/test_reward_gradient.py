"""The gradient of rewards at latents: in two stages, by hand, in float16, and where a sample or a reward fails."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from genalign.algorithms.reward_gradient import latent_gradient, require_gradients
from genalign.scoring.score import NamedReward
from genalign.types import Prompt
from tests.genalign.algorithms.gaussian_chain import GaussianChain, gaussian_flow

LATENTS = torch.tensor([[0.3, -0.2], [1.1, 0.4]], dtype=torch.float64)
PROMPTS = [Prompt("a"), Prompt("b")]


class Decoding(GaussianChain):
    """The toy with a decoder, tanh(z) / 2 + 1 / 2."""

    def decode(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents) / 2 + 0.5


def decoding() -> Decoding:
    toy = gaussian_flow()
    return Decoding(toy.path, toy.levels[:-1].tolist())


def linear(*slopes: float) -> NamedReward:
    """A reward of the toy's two values."""
    weights = torch.tensor(slopes, dtype=torch.float64)
    return NamedReward("linear", lambda samples, prompts: samples @ weights.to(samples.dtype))


def quadratic(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples @ torch.tensor([1.0, -2.0], dtype=samples.dtype) - samples.square().sum(1)


def test_two_stages_are_one_back_propagation() -> None:
    found = latent_gradient(decoding(), [NamedReward("r", quadratic)], LATENTS, PROMPTS)
    whole = LATENTS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(quadratic(decoding().decode(whole), PROMPTS).sum(), whole)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.samples, decoding().decode(LATENTS))


def test_rewards_add_up_by_weight_or_by_their_direction() -> None:
    """g1 = (3, 4), g2 = (0, -0.5) with weights 1 and 2: (3, 3), or (0.6, 0.8) + 2 (0, -1)."""
    rewards = [linear(3.0, 4.0), NamedReward("other", linear(0.0, -0.5).function, 2.0)]
    plain, equal = (
        latent_gradient(gaussian_flow(), rewards, LATENTS, PROMPTS, normalize_gradients=normalize)
        for normalize in (False, True)
    )
    torch.testing.assert_close(plain.gradient, torch.tensor([[3.0, 3.0]] * 2, dtype=torch.float64))
    torch.testing.assert_close(equal.gradient, torch.tensor([[0.6, -1.2]] * 2, dtype=torch.float64))
    one, zero = linear(3.0, 4.0), NamedReward("flat", lambda samples, prompts: 0 * samples.sum(1), 2.0)
    flat = latent_gradient(gaussian_flow(), [one, zero], LATENTS, PROMPTS, normalize_gradients=True)
    torch.testing.assert_close(flat.gradient, torch.tensor([[0.6, 0.8]] * 2, dtype=torch.float64))


def test_a_ceiling_stops_the_samples_that_have_reached_it() -> None:
    found = latent_gradient(gaussian_flow(), [linear(1.0, 1.0)], LATENTS, PROMPTS, ceiling=0.5)
    assert found.gradient.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert found.scores[:, 0].tolist() == pytest.approx([0.1, 1.5])


def test_a_float16_decoder_keeps_small_gradients() -> None:
    """A reward in units of 1e-9 has a gradient that float16 cannot hold: it is brought near 1 and back."""

    class Half(GaussianChain):
        def decode(self, latents: Tensor) -> Tensor:
            return (latents.half() * 2).float()

    toy = gaussian_flow()
    small = NamedReward("small", lambda samples, prompts: 3e-9 * samples.sum(1))
    found = latent_gradient(Half(toy.path, toy.levels[:-1].tolist()), [small], LATENTS.float(), PROMPTS)
    torch.testing.assert_close(found.gradient, torch.full((2, 2), 6e-9), rtol=1e-3, atol=0)


def test_a_sample_or_a_score_that_is_not_finite_moves_nothing() -> None:
    def failing(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.where(samples[:, 0] > 1, torch.nan, 1.0) * samples.sum(1)

    latents = torch.cat([LATENTS, torch.tensor([[torch.inf, 0.0]], dtype=torch.float64)])
    found = latent_gradient(gaussian_flow(), [NamedReward("r", failing)], latents, [*PROMPTS, Prompt("c")])
    assert found.gradient.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert found.scores.isnan()[:, 0].tolist() == [False, True, True]


def test_a_reward_without_a_gradient_is_named_unless_it_only_reports() -> None:
    def black_box(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor(samples.detach().sum(1).tolist())

    rewards = [linear(1.0, 1.0), NamedReward("verifier", black_box)]
    with pytest.raises(ValueError, match="reward 'verifier' has no gradient: give it weight 0, or choose what needs"):
        latent_gradient(gaussian_flow(), rewards, LATENTS, PROMPTS)
    with pytest.raises(ValueError, match="reward 'verifier' has no gradient"):
        require_gradients(rewards, LATENTS, PROMPTS)
    reported = [rewards[0], NamedReward("verifier", black_box, 0.0)]
    require_gradients(reported, LATENTS, PROMPTS)
    assert not LATENTS.requires_grad
    found = latent_gradient(gaussian_flow(), reported, LATENTS, PROMPTS)
    torch.testing.assert_close(found.scores[:, 1], found.scores[:, 0])
