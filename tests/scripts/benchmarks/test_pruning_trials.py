"""Pruning tried on recorded trajectories: costs by hand, and scores whose outcome is known."""

from __future__ import annotations

import pytest
import torch

from genalign.search.pruning import PruneSchedule
from scripts.benchmarks.pruning_trials import Costs, Trials, best_of, schedules

COSTS = Costs(10, 1.0, 2.0, 3.0, {"dear": 4.0, "free": 0.0})
HALF = PruneSchedule((3,), (0.5,))


def test_costs_by_hand() -> None:
    assert COSTS.sample() == 15 and COSTS.sample(5) == 10
    assert COSTS.pruning(HALF, "free", 4) == 4 * 4 + 2 * 6 + 2 * 5  # four forwards of each, then six of the better half
    assert COSTS.pruning(HALF, "dear", 4) == 38 + 4 * 4
    assert COSTS.affordable(HALF, "free", 3, most=8) == 4 and COSTS.affordable(HALF, "dear", 3, most=8) == 2
    assert COSTS.affordable(HALF, "free", 3, most=2) == 2 and COSTS.affordable(HALF, "dear", 0.1, most=8) == 0


def test_previews_that_know_the_end_find_the_best_and_those_that_lie_the_worst() -> None:
    ends = torch.rand(3, 16, 2, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        trials = Trials(sign * ends[:, None, :, :1], ends, (3,), subsets=600)
        found = trials.pruned(PruneSchedule((3,), (0.25,)), 4)[:, 0]
        best = sign * best_of(sign * ends, 4)[:, 0]
        torch.testing.assert_close(found, best, rtol=0, atol=0.03)


def test_the_best_schedule_looks_where_the_previews_tell() -> None:
    ends = torch.rand(6, 16, 2, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([-ends[:, :, 0], ends[:, :, 0]], dim=2)[:, None]
    chosen = Trials(scores, ends, (2, 6), subsets=8).best("free", 3, COSTS)
    assert chosen.steps == (6,) and len(schedules((2, 6))) == 9
    with pytest.raises(ValueError, match="begins no candidate under any schedule"):
        Trials(scores, ends, (2, 6), subsets=1).best("free", 0.1, COSTS)


def test_best_of_more_than_there_are_is_the_best() -> None:
    ends = torch.rand(3, 5, 2)
    torch.testing.assert_close(best_of(ends, 9)[:, 0], ends[:, :, 0].double().amax(1))
    assert best_of(ends, 1)[:, 1].tolist() == pytest.approx(ends[:, :, 1].mean(1).tolist())
