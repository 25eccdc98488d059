from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.algorithms.credit import GroupRelative
from genalign.algorithms.interfaces import RoundScores
from genalign.types import Prompt, Reward
from rewards.clip import ClipReward
from rewards.combine import (
    DeviationPenalty,
    DirectionalCorrection,
    EnsembleCredit,
    Gate,
    HarmonicMean,
    MeanMinusVariance,
    NominalAndWorst,
    Product,
    Standardized,
    TextRelativeReward,
    UncertaintyDiscount,
    VariancePenalty,
    WeightedSum,
    WorstCase,
    embedded,
    guided_text,
    learned_direction,
    median,
    save_direction,
    worst_case,
)
from rewards.constrained import Constrained
from rewards.shaped import LogSigmoidCentered, Residualized

NAN = math.nan
PROMPTS = [Prompt("a"), Prompt("a"), Prompt("b")]
SAMPLES = torch.zeros(3, 3, 2, 2)


def gives(*scores: float) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    return lambda samples, prompts: torch.tensor(scores)


def scored(reward: Callable[[Tensor, Sequence[Prompt]], Tensor]) -> list[float]:
    assert isinstance(reward, Reward)
    scores = reward(SAMPLES, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    return scores.tolist()


def near(*values: float) -> object:
    return pytest.approx(values, abs=1e-6, nan_ok=True)


A, B, C = gives(1.0, 2.0, 3.0), gives(3.0, 2.0, NAN), gives(5.0, 2.0, 1.0)


def test_sums_products_and_the_worst() -> None:
    assert scored(WeightedSum([A, B], [1.0, -2.0])) == near(-5, -2, NAN)
    assert scored(WeightedSum([A, B], [1.0, 0.0])) == near(1, 2, 3)
    assert scored(Product([A, B, C])) == near(15, 8, NAN)
    assert scored(WorstCase([A, C])) == near(1, 2, 1)
    assert scored(WorstCase([A, B, C])) == near(1, 2, NAN)


def test_the_variance_is_taken_off_and_not_the_deviation() -> None:
    """Scores 1, 3, 5: mean 3, variance 8/3 with ddof 0 and 4 with ddof 1, half as much again."""
    scores = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
    assert VariancePenalty(0.5, ddof=0)(scores).tolist() == near(3 - 0.5 * 8 / 3, 2)
    assert VariancePenalty()(scores).tolist() == near(3 - 0.1 * 4, 2)
    assert worst_case(scores).tolist() == [1, 2]
    assert scored(MeanMinusVariance([A, B, C], 0.5)) == near(3 - 0.5 * 8 / 3, 2, NAN)
    with pytest.raises(ValueError, match="ddof 1 needs more than 1 scores, not 1"):
        VariancePenalty()(scores[:, :1])


POOLS = {
    worst_case: [1, 2, 0],
    VariancePenalty(0.5, ddof=0): [3 - 0.5 * 8 / 3, 2, 0.2222222222],
    VariancePenalty(): [3 - 0.1 * 4, 2, 1.2333333333],
    median: [3, 2, 1],
    DeviationPenalty(): [1.3670068381, 2, -0.0330065045],
    NominalAndWorst(): [2, 2, 0.8333333333],
    NominalAndWorst(0.7): [2.4, 2, 1.1666666667],
}


def test_pools_of_an_ensemble() -> None:
    scores = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0], [0.0, 4.0, 1.0]])
    for pool, expected in POOLS.items():
        assert pool(scores).tolist() == near(*expected)
        assert pool(scores.index_fill(1, torch.tensor([1]), NAN)).isnan().all()  # a member without a score
        twins = torch.tensor([[0.3, 0.3], [-2.0, -2.0]])
        assert pool(twins).tolist() == near(0.3, -2.0)  # of equal members all agree
        penalized = isinstance(pool, VariancePenalty | DeviationPenalty)
        assert bool((worst_case(scores) <= pool(scores)).all()) or penalized
    assert torch.equal(DeviationPenalty(penalty=0.0)(scores), scores.mean(1))
    assert median(torch.tensor([[1.0, 4.0]])).tolist() == [2.5]
    with pytest.raises(ValueError, match="ddof 1 needs more than 1 scores, not 1"):
        DeviationPenalty(ddof=1)(scores[:, :1])
    with pytest.raises(ValueError, match=r"the weight of the mean, in \[0, 1\], not 1\.5"):
        NominalAndWorst(1.5)


def test_the_harmonic_mean_of_two_similarities() -> None:
    """RPO's lambda-harmonic reward of the cosines 0.8 and 0.3."""
    first, second = (Standardized(gives(*[cosine] * 3), -1.0, 2.0) for cosine in (0.8, 0.3))
    for share, expected in ((0.3, 0.709090919284), (0.5, 0.754838719938), (0.7, 0.806896561974)):
        assert scored(HarmonicMean([first, second], [share, 1 - share])) == near(*[expected] * 3)
        assert scored(HarmonicMean([first, second], [10 * share, 10 - 10 * share])) == near(*[expected] * 3)
    assert scored(HarmonicMean([A, C])) == near(2 / (1 + 1 / 5), 2, 2 / (1 / 3 + 1))
    assert scored(HarmonicMean([A, B, gives(0.0, 1.0, 1.0)])) == near(0, 1.5, NAN)
    with pytest.raises(ValueError, match="a harmonic mean needs scores of 0 or more: map cosines by Standardized"):
        HarmonicMean([A, gives(-1.0, 1.0, 1.0)])(SAMPLES, PROMPTS)
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="weights must be one positive number for each reward"):
            HarmonicMean([A, B], weights)


def test_a_product_of_negative_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="a product needs scores of 0 or more"):
        Product([A, gives(-1.0, 1.0, 1.0)])(SAMPLES, PROMPTS)
    with pytest.raises(ValueError, match="no rewards to combine"):
        WorstCase([])(SAMPLES, PROMPTS)


def test_standardised_by_fixed_statistics() -> None:
    reward = Standardized.measured(B, SAMPLES, PROMPTS)
    assert (reward.mean, reward.std) == (2.5, 0.5)
    assert scored(reward) == near(1, -1, NAN)
    assert scored(WorstCase([reward, Standardized(A, 2.0, 1.0)])) == near(-1, -1, NAN)
    with pytest.raises(ValueError, match="tells no sample from another"):
        Standardized.measured(gives(1.0, 1.0, 1.0), SAMPLES, PROMPTS)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        Standardized.measured(gives(1.0, NAN, NAN), SAMPLES, PROMPTS)


def test_a_gate() -> None:
    assert scored(Gate(A, C, threshold=2.0)) == near(1, 2, 0)
    assert scored(Gate(A, C, threshold=2.5, otherwise=-1.0)) == near(1, -1, -1)
    assert scored(Gate(A, B, threshold=2.5)) == near(1, 0, NAN)
    assert scored(Gate(B, A, threshold=2.5)) == near(0, 0, NAN)
    assert scored(Gate(B, C, threshold=2.0)) == near(3, 2, 0)  # closed: the missing score is not asked for


def test_gradients_pass_through() -> None:
    def total(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return samples.flatten(1).sum(1)

    inner = WeightedSum([Standardized(total, 0.0, 2.0), LogSigmoidCentered(total, 0.0)], [1.0, 1.0])
    leaf = SAMPLES.clone().requires_grad_(True)
    MeanMinusVariance([inner, Gate(inner, total, -1.0)])(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 0.5 + 0.5))  # sigmoid(0) = 1/2


def outcome(scores: Tensor, weights: Sequence[float]) -> RoundScores:
    return RoundScores(scores, tuple(weights), torch.arange(len(scores)) // 4)


def _mean(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


@dataclass(frozen=True)
class BlackBox:
    """A verifier, whose scores have no gradient."""

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return _mean(samples.detach(), prompts)


@pytest.mark.parametrize(
    "combination",
    [
        WeightedSum([_mean, BlackBox()], [1.0, 0.5]),
        Product([_mean, BlackBox()]),
        HarmonicMean([BlackBox(), _mean]),
        WorstCase([_mean, BlackBox()]),
        MeanMinusVariance([_mean, BlackBox()]),
        Gate(BlackBox(), _mean, 0.0),
        Residualized(_mean, BlackBox(), 1.0, 0.0),
        Constrained({"a": _mean, "b": BlackBox()}, {"a": 1.0, "b": 1.0}),
        Standardized(WorstCase([_mean, BlackBox()]), 0.0, 1.0),
    ],
    ids=lambda combination: type(combination).__name__,
)
def test_a_member_without_a_gradient_is_refused_where_one_is_followed(combination: Reward) -> None:
    """Its score would be a constant, and the gradient that of the other members alone."""
    leaf = torch.rand(3, 3, 2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"^BlackBox, a part of a combination of rewards, has no gradient: make it"):
        combination(leaf, PROMPTS)
    with torch.no_grad():
        combination(leaf, PROMPTS)
    combination(leaf.detach(), PROMPTS)


def test_a_member_that_is_a_constant_on_purpose_needs_no_gradient() -> None:
    leaf = torch.rand(3, 3, 2, 2, requires_grad=True)
    for combination in (WeightedSum([_mean, BlackBox()], [1.0, 0.0]), Gate(_mean, BlackBox(), 0.0)):
        (gradient,) = torch.autograd.grad(combination(leaf, PROMPTS).sum(), leaf)
        torch.testing.assert_close(gradient, torch.full_like(leaf, 1 / 12))
    with pytest.raises(ValueError, match=r"^Standardized of BlackBox, a part"):
        WorstCase([_mean, Standardized(BlackBox(), 0.0, 1.0)])(leaf, PROMPTS)


def test_ensembles_compare_within_the_group() -> None:
    """One member is shifted by a constant per group and stretched, which changes nothing."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    shifted = 7 * second + torch.tensor([100.0, -50.0]).repeat_interleave(4)
    for pool in POOLS:
        plain = EnsembleCredit(pool)(outcome(torch.stack([first, second], 1), [1.0, 1.0]))
        other = EnsembleCredit(pool)(outcome(torch.stack([first, shifted], 1), [1.0, 1.0]))
        torch.testing.assert_close(plain, other, rtol=0, atol=1e-3)
        assert plain.view(2, 4).mean(1).abs().max() < 1e-5
    z = torch.stack([(x.view(2, 4) - x.view(2, 4).mean(1, keepdim=True)).flatten() for x in (first, second)], 1)
    z = z / z.view(2, 4, 2).std(1, correction=0).repeat_interleave(4, 0)
    least = z.amin(1).view(2, 4)
    expected = (least - least.mean(1, keepdim=True)) / least.std(1, correction=0, keepdim=True)
    credit = EnsembleCredit()(outcome(torch.stack([first, second], 1), [1.0, 1.0]))
    torch.testing.assert_close(credit, expected.flatten(), rtol=0, atol=2e-3)


def test_a_negative_weight_turns_a_member_around() -> None:
    """Members that agree but for the sign: their disagreement is 0, and their least is either."""
    scores = torch.tensor([[2.0, -9.0], [0.0, -5.0], [2.0, -9.0], [0.0, -5.0]])
    plain = GroupRelative()(outcome(scores[:, :1], [1.0]))
    for pool in POOLS:
        credit = EnsembleCredit(pool)(outcome(scores, [0.5, -2.0]))
        torch.testing.assert_close(credit, plain, rtol=0, atol=1e-3)
    unchanged = UncertaintyDiscount(lambda found: plain, 5.0)(outcome(scores, [0.5, -2.0]))
    torch.testing.assert_close(unchanged, plain, rtol=0, atol=1e-3)
    torn = UncertaintyDiscount(lambda found: plain, 5.0)(outcome(scores, [0.5, 2.0]))
    assert float(torn.abs().max()) < 0.01  # z-scores of 1 and -1 differ by a deviation of 1: exp(-5)


def test_an_ensemble_has_two_rewards() -> None:
    with pytest.raises(ValueError, match="needs 2 rewards or more of non-zero weight, not 1"):
        EnsembleCredit()(outcome(torch.zeros(8, 3), [1.0, 0.0, 0.0]))


def test_disagreement_shrinks_the_credit() -> None:
    """Z-scores of the members, one group: (1, -1, 1, -1) and (1, -1, -1, 1); they differ by 0, 0, 2, 2."""
    scores = torch.tensor([[2.0, 9.0], [0.0, 5.0], [2.0, 5.0], [0.0, 9.0]])
    plain = GroupRelative()(outcome(scores, [1.0, 1.0]))
    for strength in (0.0, 1.0, 2.0):
        discounted = UncertaintyDiscount(GroupRelative(), strength)(outcome(scores, [1.0, 1.0]))
        factor = torch.tensor([1.0, 1.0, math.exp(-strength), math.exp(-strength)])
        torch.testing.assert_close(discounted, plain * factor, rtol=0, atol=1e-3)
    stepwise = UncertaintyDiscount(lambda found: torch.ones(4, 5))(outcome(scores, [1.0, 1.0]))
    assert stepwise.shape == (4, 5) and stepwise[:, 0].tolist() == pytest.approx([1, 1, 0.3679, 0.3679], abs=1e-3)
    scores[0, 1] = NAN
    assert UncertaintyDiscount(lambda found: torch.ones(4))(outcome(scores, [1.0, 1.0]))[0] == 0


def test_the_guided_text_by_hand() -> None:
    """For b of length 0.1 at a right angle to e: e+- = (e +- b) / sqrt(1.01), so that |e~| = sqrt(1.04 / 1.01)."""
    text, direction = torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 0.1])
    guided = guided_text(text, direction, omega=1.5)
    torch.testing.assert_close(guided, torch.tensor([[1.0, 0.2]]) / math.sqrt(1.01))
    assert float(guided.norm()) == pytest.approx(1.015, abs=5e-4)
    torch.testing.assert_close(guided_text(text, 0 * direction, 1.5), text)


def test_a_direction_that_is_zero_changes_nothing_and_another_one_does() -> None:
    base = ClipReward("shapes-clip")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("a red circle"), Prompt("a blue ring"), Prompt("two squares")]
    plain = DirectionalCorrection(base, torch.zeros(128))
    torch.testing.assert_close(plain(images, prompts), base(images, prompts))
    direction = 0.1 * torch.randn(128, generator=torch.Generator().manual_seed(1))
    image, text = embedded(base, images, prompts)
    expected = F.cosine_similarity(image, guided_text(text, direction, 2.0))
    torch.testing.assert_close(DirectionalCorrection(base, direction, 2.0)(images, prompts), expected)


def test_a_text_relative_reward_by_hand() -> None:
    """(1 + k) cos(image, positive prompt) - cos(image, negative prompt), on the embeddings of fixture F16."""
    texts = {"real a circle": [1.0, 0.0, 1.0], "drawn a circle": [0.0, 1.0, 0.0]}

    class Encoder:
        def __call__(self, samples: Tensor) -> Tensor:
            return torch.tensor([[1.0, 2.0, 2.0]]).expand(len(samples), 3)

        def text(self, prompts: Sequence[str]) -> Tensor:
            return F.normalize(torch.tensor([texts[prompt] for prompt in prompts]), dim=-1)

    base = SimpleNamespace(encoder=lambda device: Encoder())
    reward = TextRelativeReward(base, "real", "drawn", k=0.1)
    assert float(reward(torch.zeros(1, 3, 8, 8), [Prompt("a circle")])) == pytest.approx(0.111150792639, abs=1e-6)


def test_a_direction_is_learned_saved_and_loaded(tmp_path: Path) -> None:
    """What the images of all prompts have in common, and their texts have not, is what it points to."""
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(64, 16, generator=generator), dim=-1)
    common = F.normalize(torch.randn(16, generator=generator), dim=0)
    image = F.normalize(text + common, dim=-1)
    direction = learned_direction(image, text, steps=200, learning_rate=1e-3)
    assert float(F.cosine_similarity(direction, common, dim=0)) > 0.9
    before, after = (F.cosine_similarity(image, guided_text(text, b, 1.5)).mean() for b in (0 * direction, direction))
    assert after > before + 0.05
    torch.testing.assert_close(direction, learned_direction(image, text, steps=200, learning_rate=1e-3))
    save_direction(tmp_path / "b.safetensors", direction)
    embedding = torch.randn(128, generator=generator)
    save_direction(tmp_path / "clip.safetensors", embedding)
    images = torch.rand(1, 3, 64, 64, generator=generator)
    from_file = DirectionalCorrection(ClipReward("shapes-clip"), str(tmp_path / "clip.safetensors"))
    from_tensor = DirectionalCorrection(ClipReward("shapes-clip"), embedding)
    assert torch.equal(from_file(images, PROMPTS[:1]), from_tensor(images, PROMPTS[:1]))
    with pytest.raises(ValueError, match=r"embeddings must be \(n, d\) and \(n, d\)"):
        learned_direction(image, text[:3])
    with pytest.raises(ValueError, match=r"shape \(16,\), and the embeddings of this encoder have 128 dimensions"):
        DirectionalCorrection(ClipReward("shapes-clip"), direction)(images, PROMPTS[:1])


def test_a_direction_is_learned_from_batches_of_samples(tmp_path: Path) -> None:
    base = ClipReward("shapes-clip")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("a red circle"), Prompt("a blue ring"), Prompt("two squares")]
    path = tmp_path / "direction.safetensors"
    reward = DirectionalCorrection(base, str(path), omega=2.0)
    reward.learn_direction([(images[:2], prompts[:2]), (images[2:], prompts[2:])], path, seed=3)
    direction = learned_direction(*embedded(base, images, prompts), omega=2.0, seed=3)
    torch.testing.assert_close(reward(images, prompts), DirectionalCorrection(base, direction, 2.0)(images, prompts))
