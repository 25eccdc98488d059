"""ODE completions of a rollout's states on the tiny SD3 pipeline."""

from __future__ import annotations

import logging

import pytest
import torch

from genalign.diffusion.completion import Completion, complete
from genalign.diffusion.rollout import Rollout, RolloutInputs, kernel_per_step, rollout
from genalign.diffusion.transitions import FlowSDE
from genalign.scoring.budget import Ledger, Metered
from genalign.types import Grid
from pipelines import SD3

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2]
FULL = Completion()


def _start(pipeline: SD3, shared: bool) -> RolloutInputs:
    noise = (1, 1, 2, 2) if shared else (1, 2, 3, 4)
    return RolloutInputs(
        pipeline.encode(["a circle", "two squares"]), torch.tensor([0, 0, 1, 1]), noise, (10, 11, 12, 13)
    )


def _sampled(pipeline: SD3, grid: Grid, store: tuple[int, ...], shared: bool, guidance: float = 1.0) -> Rollout:
    kernels = kernel_per_step(FlowSDE(0.7), store, len(grid))
    return rollout(pipeline, _start(pipeline, shared), grid, kernels, guidance, store)


def _cost(pipeline: SD3, sampled: Rollout, grid: Grid, guidance: float = 1.0, completion: Completion = FULL) -> int:
    metered = Metered(pipeline, Ledger())
    complete(metered, sampled, grid, guidance, completion)
    return metered.ledger.nfe


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_state_is_completed_by_the_ode(tiny: SD3, guidance: float) -> None:
    grid = tiny.grid(5, SIGMAS)
    sampled = _sampled(tiny, grid, (1, 2, 3), shared=False, guidance=guidance)
    completed = complete(tiny, sampled, grid, guidance)
    conditioning = sampled.inputs.conditioning[sampled.inputs.prompt]
    for stored, index in enumerate(sampled.steps):
        x = sampled.x[:, stored]
        for i in range(index, 5):
            step = grid[i]
            velocity = tiny.predict(x, step, conditioning, guidance)
            x = x + float(step.sigma_next - step.sigma) * velocity
        torch.testing.assert_close(completed[:, stored], x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cost_follows_the_formula(tiny: SD3, guidance: float) -> None:
    grid = tiny.grid(10, [1 - i / 10 for i in range(10)])
    sampled = _sampled(tiny, grid, tuple(range(9)), shared=False, guidance=guidance)
    per_sample = sum(10 - 1 - i for i in range(9))
    assert per_sample == 45
    assert _cost(tiny, sampled, grid, guidance) == 4 * per_sample * (2 if guidance > 1 else 1)


def test_a_shared_state_is_completed_once(tiny: SD3) -> None:
    grid = tiny.grid(5, SIGMAS)
    sampled = _sampled(tiny, grid, (1, 2), shared=True)
    assert _cost(tiny, sampled, grid) == 2 * 3 + 4 * 2
    completed = complete(tiny, sampled, grid, 1.0)
    assert torch.equal(completed[0, 0], completed[1, 0])
    assert not torch.allclose(completed[0, 1], completed[1, 1])


def test_fewer_steps_cost_less_and_one_costs_nothing(tiny: SD3, caplog: pytest.LogCaptureFixture) -> None:
    grid = tiny.grid(5, SIGMAS)
    sampled = _sampled(tiny, grid, (0, 1), shared=False)
    assert _cost(tiny, sampled, grid, completion=Completion(2)) == 4 * 2
    with caplog.at_level(logging.WARNING):
        completed = complete(tiny, sampled, grid, 1.0, Completion(1))
    assert "worse than Flow-GRPO" in caplog.text
    assert _cost(tiny, sampled, grid, completion=Completion(1)) == 0
    expected = sampled.x[:, 1] - float(grid[1].sigma) * sampled.prediction[:, 1]
    torch.testing.assert_close(completed[:, 1], expected, rtol=0, atol=1e-5)


def test_stops_are_the_grid_that_is_left() -> None:
    assert Completion().stops(2, 5) == (2, 3, 4)
    assert Completion(2).stops(0, 10) == (0, 5)
    assert Completion(4).stops(8, 10) == (8, 9)
    with pytest.raises(ValueError, match="completion steps must be at least 1, not 0"):
        Completion(0)
