"""Heads, and the terms beside the loss of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genalign.reward_learning.heads import AttentionHead, IdentityHead, LinearHead, MLPHead
from genalign.reward_learning.network import HeadShape, RewardEncoder, RewardNetwork
from genalign.reward_learning.regularizers import (
    Centering,
    Disentangle,
    GradientPenalty,
    ScoredBatch,
    gradient_penalty,
    odin_correlations,
)
from genalign.reward_learning.uncertainty import LaplacePosterior
from genalign.types import Prompt


class Flat(RewardEncoder):
    """Samples themselves, as one token."""

    @property
    def arguments(self) -> dict[str, Any]:
        return {}

    @property
    def width(self) -> int:
        return 4

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return ()

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return samples[:, None]


def batch(outputs: Tensor, head: nn.Module, tokens: Tensor, nuisances: Tensor, pairs: Tensor | None) -> ScoredBatch:
    return ScoredBatch(tokens, outputs, pairs, nuisances, head)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [LinearHead(), MLPHead(8), AttentionHead(2, 4)])
def test_a_head_is_a_linear_layer_on_its_features(shape: HeadShape) -> None:
    torch.manual_seed(0)
    head, tokens = shape.build(6, 3), torch.randn(5, 7, 6)
    outputs = head(tokens)
    assert outputs.shape == (5, 3)
    torch.testing.assert_close(outputs, head.features(tokens) @ head.last.weight.T + head.last.bias)
    shuffled = tokens[:, torch.randperm(7)]
    torch.testing.assert_close(head(shuffled), outputs)  # parts have no order


def test_attention_weighs_tokens() -> None:
    torch.manual_seed(0)
    head = AttentionHead(1, 4).build(2, 1)
    plain = torch.zeros(1, 50, 2)
    one = plain.clone()
    one[0, 3] = torch.tensor([30.0, 30.0])
    mean_of_values = (head(one) - head(plain)).abs()
    assert mean_of_values.item() > 0 and head(one).isfinite().all()


def test_the_identity_head_starts_as_the_scores() -> None:
    scores = torch.randn(4, 1, 2)
    torch.testing.assert_close(IdentityHead().build(2, 2)(scores), scores[:, 0])
    with pytest.raises(ValueError, match="a token has 2 numbers and there are 3 outputs"):
        IdentityHead().build(2, 3)


def test_members_are_pooled_from_their_levels() -> None:
    torch.manual_seed(0)
    encoder = Flat()
    heads = [LinearHead().build(4, 2) for _ in range(3)]
    network = RewardNetwork(encoder, heads, output=1)
    network.level.copy_(torch.randn(3, 2))
    samples, prompts = torch.randn(6, 4), [Prompt("a")] * 6
    members = torch.stack([head(samples[:, None])[:, 1] for head in heads], 1) - network.level[:, 1]
    torch.testing.assert_close(network(samples, prompts), members.mean(1))
    least = RewardNetwork(encoder, heads, 1, "min")
    careful = RewardNetwork(encoder, heads, 1, "mean_minus_std")
    for other in (least, careful):
        other.level.copy_(network.level)
    torch.testing.assert_close(least(samples, prompts), members.min(1).values)
    torch.testing.assert_close(careful(samples, prompts), members.mean(1) - members.std(1, correction=0))
    with pytest.raises(ValueError, match="pool must be one of mean, min, mean_minus_std"):
        RewardNetwork(encoder, heads, pool="median")  # type: ignore[arg-type]


def test_a_single_member_has_the_deviation_of_its_posterior_or_none() -> None:
    torch.manual_seed(0)
    encoder, head, root = Flat(), LinearHead().build(4, 2), torch.randn(4, 4, dtype=torch.float64)
    for pool in ("min", "mean_minus_std"):
        with pytest.raises(ValueError, match=f"pool '{pool}' compares the members of an ensemble, and this reward has"):
            RewardNetwork(encoder, [head], pool=pool)
    posterior = LaplacePosterior(root @ root.T, torch.randn(4, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="compares the members"):
        RewardNetwork(encoder, [head], 1, "min", posterior)
    careful = RewardNetwork(encoder, [head], 1, "mean_minus_std", posterior)
    careful.token_scale.fill_(2.0)
    samples, prompts = torch.randn(3, 4).requires_grad_(True), [Prompt("a")] * 3
    offset = samples.double() / 2 - posterior.center
    deviation = ((offset @ posterior.covariance) * offset).sum(1).sqrt()
    scores = careful(samples, prompts)
    torch.testing.assert_close(careful.deviation(samples[:, None]), deviation.float())
    torch.testing.assert_close(scores, head(samples[:, None] / 2)[:, 1] - deviation.float())
    (gradient,) = torch.autograd.grad(scores.sum(), samples)
    slope = (head.last.weight[1] - (offset @ posterior.covariance) / deviation[:, None]) / 2
    torch.testing.assert_close(gradient, slope.detach().float())
    careful.center = posterior.center.float().double()
    center = (2 * posterior.center.float()[None]).requires_grad_(True)  # whose score has no deviation
    (gradient,) = torch.autograd.grad(careful(center, prompts[:1]).sum(), center)
    torch.testing.assert_close(gradient, head.last.weight[1:].detach() / 2)
    assert set(careful.state_dict()) == set(RewardNetwork(encoder, [head]).state_dict())


def test_the_gradient_penalty_of_a_linear_head_is_that_of_its_weights() -> None:
    torch.manual_seed(0)
    head, tokens = LinearHead().build(4, 1), torch.randn(3, 1, 4)
    norm = head.last.weight.norm()
    torch.testing.assert_close(gradient_penalty(head, tokens, 0.0), norm.square())
    torch.testing.assert_close(gradient_penalty(head, tokens, 3.0), (norm - 3).square())
    assert gradient_penalty(head, tokens, 3.0, one_sided=True).item() == 0
    value = gradient_penalty(head, tokens, 0.1)
    (gradient,) = torch.autograd.grad(value, head.last.weight)
    torch.testing.assert_close(gradient, 2 * (norm - 0.1) * head.last.weight / norm, rtol=1e-4, atol=1e-5)
    pairs = torch.tensor([[0, 1], [1, 2]])
    scored = batch(head(tokens), head, tokens, torch.empty(3, 0), pairs)
    torch.testing.assert_close(GradientPenalty(2.0, 1.0, between=True).term(scored), 2 * (norm - 1).square())


def test_centering_is_of_the_sum_of_a_pair() -> None:
    outputs = torch.tensor([[1.0], [2.0], [-4.0]])
    head, tokens = LinearHead().build(4, 1), torch.zeros(3, 1, 4)
    scored = batch(outputs, head, tokens, torch.empty(3, 0), torch.tensor([[0, 1], [1, 2]]))
    assert float(Centering(0.1).term(scored)) == pytest.approx(0.1 * (9 + 4) / 2)


def test_odin_terms() -> None:
    values = [[1, 2, 3, 4], [0.2, 0.1, 0.4, 0.3], [0.5, 0.9, 1.4, 2.1]]
    length, quality, own = torch.tensor(values, dtype=torch.float64)
    assert float(odin_correlations(length, own, quality)) == pytest.approx(0.008088756 + 0.6, abs=1e-8)
    head, tokens = LinearHead().build(4, 2), torch.zeros(4, 1, 4)
    scored = batch(torch.stack([quality, own], 1), head, tokens, length[:, None], None)
    apart = Disentangle({"length": lambda samples, prompts: samples}, weight=2.0, orthogonality=3.0)
    overlap = (head.last.weight[0] @ head.last.weight[1]).abs().item()
    assert apart.term(scored).item() == pytest.approx(2 * 0.608088756 + 3 * overlap, abs=1e-6)
    with pytest.raises(ValueError, match="at least one nuisance"):
        Disentangle({})
