import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genalign.algorithms.credit import SetContrast
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.preference_pairs import Criterion, best_and_worst_pairs, greedy_swap, paired_halves
from genalign.metrics.frechet import Gaussian, frechet_distance, gaussian_distance
from genalign.metrics.vendi import vendi_score

CRITERIA: tuple[Criterion, ...] = ("plus", "gap")


class Frechet:
    def __init__(self, reference: Tensor) -> None:
        self.gaussian = Gaussian.fit(reference)

    def __call__(self, features: Tensor) -> float:
        return -gaussian_distance(Gaussian.fit(features), self.gaussian)


def toy(n: int = 64, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A reference, and two sets of on-policy samples that are off in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(500, d, generator=generator)
    first, second = (1.2 * torch.randn(2, n, d, generator=generator) + 0.4).unbind(0)
    return reference, first, second


def mean_reward(features: Tensor) -> float:
    return float(features.mean())


def test_best_and_worst_pairs_take_the_best_and_the_worst_of_a_prompt() -> None:
    scores = torch.tensor([0.1, 5.0, 0.9, 2.0, 0.5, 2.0, math.nan, 7.0, math.nan, 3.0, math.nan])
    group = torch.tensor([4, 1, 4, 2, 4, 2, 1, 1, 3, 3, 3])
    pairs = best_and_worst_pairs(scores, group)  # prompt 2 is tied, prompt 3 has one score
    assert pairs.winners.tolist() == [7, 2]
    assert pairs.losers.tolist() == [1, 0]
    assert best_and_worst_pairs(scores, group, tolerance=1.0).winners.tolist() == [7]
    assert len(best_and_worst_pairs(scores, group, tolerance=2.0)) == 0
    ties = best_and_worst_pairs(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.long))
    assert (ties.winners.tolist(), ties.losers.tolist()) == ([0], [1])


def test_several_pairs_of_a_prompt_meet_from_both_ends() -> None:
    scores = torch.tensor([0.0, 5.0, 3.0, 3.0, torch.nan, 1.0, 2.0, 2.0])
    group = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    pairs = best_and_worst_pairs(scores, group, pairs=3)
    assert list(zip(pairs.winners.tolist(), pairs.losers.tolist(), strict=True)) == [(1, 0), (2, 5)]  # 3 has no partner


def test_paired_halves_hold_the_same_prompts() -> None:
    group = torch.tensor([5, 2, 5, 2, 9, 5, 2, 5, 5, 2])
    first, second = paired_halves(group)
    assert (first.tolist(), second.tolist()) == ([1, 3, 0, 2], [6, 9, 5, 7])
    assert torch.equal(group[first], group[second])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_table_5(criterion: Criterion, seed: int) -> None:
    """DRAGON's Table 5: sets built for the distance of the set win on that, samples chosen one by one on their own."""
    reference, first, second = toy(seed=seed)
    gaussian = Gaussian.fit(reference)

    def own_distance(samples: Tensor) -> Tensor:
        """Squared Mahalanobis distance."""
        whitened = torch.linalg.solve(gaussian.factor, (samples.double() - gaussian.mean).T)
        return whitened.square().sum(0)

    from_second = greedy_swap(first, second, Frechet(reference), criterion, seed=seed)
    batch, by_set = torch.cat([first, second]), torch.where(from_second[:, None], second, first)
    by_sample = batch[best_and_worst_pairs(-own_distance(batch), torch.arange(64).repeat(2)).winners]
    start = min(frechet_distance(first, reference), frechet_distance(second, reference))
    assert frechet_distance(by_set, reference) < frechet_distance(by_sample, reference) < start
    assert own_distance(by_sample).mean() < own_distance(by_set).mean() < own_distance(batch).mean()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("reward", [Frechet(toy()[0]), vendi_score, mean_reward])
def test_exchanges_only_ever_help(criterion: Criterion, reward: Callable[[Tensor], float]) -> None:
    _, first, second = toy(n=24, seed=1)
    start = reward(first.double()), reward(second.double())
    swap = greedy_swap(first, second, reward, criterion)[:, None]
    plus, minus = (reward(torch.where(mask, second, first).double()) for mask in (swap, ~swap))
    assert plus - minus > abs(start[0] - start[1]) and (criterion == "gap" or plus > max(start))


def test_a_mean_is_maximized_by_one_pass_in_any_order() -> None:
    _, first, second = toy(n=20)
    for seed in range(3):
        assert torch.equal(greedy_swap(first, second, mean_reward, seed=seed), second.mean(1) > first.mean(1))


def test_the_seed_draws_the_order() -> None:
    reference, first, second = toy(n=40)
    splits = [greedy_swap(first, second, Frechet(reference), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ties_stay(criterion: Criterion) -> None:
    reference, first, _ = toy(n=30)
    for reward in (Frechet(reference), vendi_score, lambda features: 3.0):
        assert not greedy_swap(first, first.clone(), reward, criterion).any()


def test_the_better_set_comes_first() -> None:
    features, group = torch.tensor([[1.0], [0.0], [1.0], [0.0], [math.nan], [0.0]]), torch.tensor([0, 1, 0, 0, 1, 0])
    scores = RoundScores(torch.zeros(6, 1), (1.0,), group, features=1 - features)
    # Prompt 0 has the samples 0, 2 against 3, 5; the second half is better. Prompt 1 has a sample without features.
    assert SetContrast(mean_reward)(scores).tolist() == [-1.0, 0.0, -1.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"must be \(samples, dimensions\), not \(6,\)"):
        SetContrast(mean_reward)(replace(scores, features=torch.zeros(6)))


LONG, FIRST, SECOND = torch.zeros(2, dtype=torch.long), *toy(n=4)[1:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_and_worst_pairs(torch.tensor([math.inf, 0.0]), LONG), "infinite"),
        (lambda: best_and_worst_pairs(torch.zeros(2), LONG, tolerance=-1.0), "tolerance"),
        (lambda: best_and_worst_pairs(torch.zeros(2), LONG, pairs=0), "pairs 1 or more"),
        (lambda: greedy_swap(FIRST[:1], SECOND[:1], mean_reward), "2 pairs of samples or more, got 1"),
        (lambda: greedy_swap(FIRST, SECOND[:3], mean_reward), "paired samples"),
        (lambda: greedy_swap(FIRST, SECOND, mean_reward, "minus"), "criterion"),
        (lambda: greedy_swap(FIRST, SECOND, lambda features: math.nan), "not finite"),
    ],
)
def test_inputs_are_checked(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
