"""ODE completions of a rollout's states on the tiny SD3 pipeline."""

from __future__ import annotations

import logging

import pytest
import torch

from genalign.diffusion.completion import Completion, complete
from genalign.diffusion.rollout import Rollout
from genalign.scoring.budget import Ledger, Metered
from pipelines import SD3
from tests.genalign.diffusion.rollouts import five_steps, sample


def _cost(tiny: SD3, sampled: Rollout, guidance: float = 1.0, steps: int | None = None) -> int:
    metered = Metered(tiny, Ledger())
    complete(metered, sampled, five_steps(tiny), guidance, Completion(steps))
    return metered.ledger.nfe


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_state_is_completed_by_the_ode(tiny: SD3, guidance: float) -> None:
    grid, sampled = five_steps(tiny), sample(tiny, (1, 2, 3), guidance=guidance)
    completed = complete(tiny, sampled, grid, guidance)
    conditioning = sampled.inputs.conditioning[sampled.inputs.prompt]
    for stored, index in enumerate(sampled.steps):
        x = sampled.x[:, stored]
        for i in range(index, 5):
            velocity = tiny.predict(x, grid[i], conditioning, guidance)
            x = x + float(grid[i].sigma_next - grid[i].sigma) * velocity
        torch.testing.assert_close(completed[:, stored], x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cost_follows_the_formula(tiny: SD3, guidance: float) -> None:
    sampled = sample(tiny, (0, 1, 2, 3), guidance=guidance)
    assert _cost(tiny, sampled, guidance) == 6 * (4 + 3 + 2 + 1) * (2 if guidance > 1 else 1)


def test_a_shared_state_is_completed_once(tiny: SD3) -> None:
    sampled = sample(tiny, (1, 2), shared=True)
    assert _cost(tiny, sampled) == 2 * 3 + 6 * 2
    completed = complete(tiny, sampled, five_steps(tiny), 1.0)
    assert torch.equal(completed[0, 0], completed[1, 0])
    assert not torch.allclose(completed[0, 1], completed[1, 1])


def test_fewer_steps_cost_less_and_one_costs_nothing(tiny: SD3, caplog: pytest.LogCaptureFixture) -> None:
    grid, sampled = five_steps(tiny), sample(tiny, (0, 1))
    assert _cost(tiny, sampled, steps=2) == 6 * 2
    with caplog.at_level(logging.WARNING):
        completed = complete(tiny, sampled, grid, 1.0, Completion(1))
    assert "worse than Flow-GRPO" in caplog.text
    assert _cost(tiny, sampled, steps=1) == 0
    expected = sampled.x[:, 1] - float(grid[1].sigma) * sampled.prediction[:, 1]
    torch.testing.assert_close(completed[:, 1], expected, rtol=0, atol=1e-5)


def test_stops_are_the_grid_that_is_left() -> None:
    assert Completion().stops(2, 5) == (2, 3, 4)
    assert Completion(2).stops(0, 10) == (0, 5)
    assert Completion(4).stops(8, 10) == (8, 9)
    with pytest.raises(ValueError, match="completion steps must be at least 1, not 0"):
        Completion(0)
