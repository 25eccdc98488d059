"""Pruning tried on recorded trajectories: costs by hand, and scores whose outcome is known."""

from __future__ import annotations

import itertools

import pytest
import torch

from genalign.search.pruning import PruneSchedule
from scripts.benchmarks.pruning_trials import (
    Costs,
    ScorePool,
    Trials,
    best_of,
    maximum_probabilities,
    schedules,
    task_mean,
)

COSTS = Costs(10, 1.0, 2.0, 3.0, {"dear": 4.0, "free": 0.0})
HALF = PruneSchedule((3,), (0.5,))


def test_costs_by_hand() -> None:
    assert COSTS.sample() == 15 and COSTS.sample(5) == 10
    assert COSTS.pruning(HALF, "free", 4) == 4 * 4 + 2 * 6 + 2 * 5  # four forwards of each, then six of the better half
    assert COSTS.pruning(HALF, "dear", 4) == 38 + 4 * 4
    assert COSTS.affordable(HALF, "free", 3, most=8) == 4 and COSTS.affordable(HALF, "dear", 3, most=8) == 2
    assert COSTS.affordable(HALF, "free", 3, most=3) == 0  # could begin a fourth, which was not recorded
    assert COSTS.affordable(HALF, "dear", 0.1, most=8) == 0
    assert COSTS.share(HALF, "free", 3, most=8) == 38 / 45


def test_previews_that_know_the_end_find_the_best_and_those_that_lie_the_worst() -> None:
    ends = torch.rand(3, 16, 2, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        trials = Trials(sign * ends[:, None, :, :1], ends, (3,), 600, "aab")
        found = trials.pruned(PruneSchedule((3,), (0.25,)), 4)[:, 0]
        best = sign * best_of(sign * ends, 4)[:, 0]
        torch.testing.assert_close(found, best, rtol=0, atol=0.03)


def test_the_best_schedule_looks_where_the_previews_tell() -> None:
    ends = torch.rand(6, 16, 2, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([-ends[:, :, 0], ends[:, :, 0]], dim=2)[:, None]
    chosen = Trials(scores, ends, (2, 6), 8, "aaabbb").best("free", 3, COSTS)
    assert chosen.steps == (6,) and len(schedules((2, 6))) == 9
    with pytest.raises(ValueError, match="no schedule begins 1 to 16 candidates for the cost"):
        Trials(scores, ends, (2, 6), 1, "aaabbb").best("free", 0.1, COSTS)


def test_a_schedule_that_could_start_more_than_were_recorded_is_no_candidate() -> None:
    """Early and sharp pruning would find the most, but spends its budget on candidates that are not there."""
    ends = torch.rand(6, 8, 2, generator=torch.Generator().manual_seed(0))
    previews = ends[:, None, :, :1].expand(-1, -1, -1, 2)  # they tell all
    trials = Trials(previews, ends, (2, 6), 8, "aaabbb")
    assert not COSTS.affordable(PruneSchedule((2,), (0.2,)), "free", 4, trials.most)
    chosen = trials.best("free", 4, COSTS)
    assert 0.95 < COSTS.share(chosen, "free", 4, trials.most) <= 1
    with pytest.raises(ValueError, match="or record more candidates"):
        trials.best("free", 40, COSTS)


def test_tasks_count_alike() -> None:
    values = torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 1.0]])
    assert task_mean(values, ["a", "a", "b"]).tolist() == [5.0, 0.5]  # 2 of a, 8 of b
    trials = Trials(torch.zeros(3, 1, 2, 1), torch.zeros(3, 2, 2), (2,), 1, ["a", "a", "b"])
    assert trials.reward(values) == 5.0


def test_best_of_more_than_there_are_is_the_best() -> None:
    ends = torch.rand(3, 5, 2)
    torch.testing.assert_close(best_of(ends, 9)[:, 0], ends[:, :, 0].double().amax(1))
    assert best_of(ends, 1)[:, 1].tolist() == pytest.approx(ends[:, :, 1].mean(1).tolist())


def test_maximum_probabilities_give_the_exact_expected_maximum() -> None:
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for count in (1, 3, 7):
        brute = [[max(subset) for subset in itertools.combinations(row, count)] for row in values.tolist()]
        expected = torch.tensor([sum(found) / len(found) for found in brute], dtype=torch.float64)
        torch.testing.assert_close(values.sort(dim=1).values @ maximum_probabilities(7, count), expected)
    with pytest.raises(ValueError, match="count must be 1 to 7"):
        maximum_probabilities(7, 8)


def test_a_pool_simulates_pruning() -> None:
    clean = torch.randn(4, 16, 1, 1, generator=torch.Generator().manual_seed(2))
    pool = ScorePool(clean.expand(4, 16, 6, 1))
    schedule, subset = PruneSchedule((1, 3), (0.5, 0.25)), torch.arange(10)
    assert torch.equal(pool.winners(schedule, subset), clean[:, :10, 0, 0].argmax(1))
    assert pool.pruned(schedule, subset).shape == (4, 2)
    apart = torch.stack([torch.arange(6) + 2 * prompt for prompt in range(4)])
    expected = [2 * prompt + int(clean[prompt, 2 * prompt : 2 * prompt + 6].argmax()) for prompt in range(4)]
    assert pool.winners(schedule, apart).tolist() == expected
    with pytest.raises(ValueError, match="prompt 1 has 2 distinct trajectories among 3: drop the duplicates"):
        ScorePool(torch.zeros(2, 3, 2, 1), torch.tensor([[1, 2, 3], [1, 1, 2]]))
