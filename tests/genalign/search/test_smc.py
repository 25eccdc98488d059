import logging
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.diffusion.paths import FlowPath
from genalign.diffusion.transitions import CPS, DDIM, ODE, FlowSDE, transition
from genalign.search.resampling import RESAMPLERS, ResamplerName, normalized_weights
from genalign.search.smc import FKSettings, FKState, Potential, require_stochastic
from genalign.types import Grid

# Data N(0, 1), a flow of 50 steps, reward x, lam 1, previews scored at 9, 16, ..., 44 and the sample at 49.
STEPS, SCORED = 50, (9, 16, 23, 30, 37, 44, 49)
TOY = FKSettings(lam=1.0, start=0.18, stop=0.88, every=0.14, terminal="weighted")
PARTICLES, SEEDS = 100_000, range(8)
EVERY_TIME, SOMETIMES = None, 0.5


def flow_grid(steps: int, shift: float = 3.0) -> Grid:
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigma = shift * even / (1 + (shift - 1) * even)
    return Grid(timestep=sigma[:-1], alpha=1 - sigma, sigma=sigma)


GRID, PATH = flow_grid(STEPS), FlowPath()


@dataclass(frozen=True)
class Moment:
    """Weighted moments of the samples, averaged over runs."""

    mean: float
    sd: float


def prediction(x: Tensor, step: int) -> Tensor:
    """E[eps - x0 | x] for data N(0, 1)."""
    alpha, sigma = float(GRID.alpha[step]), float(GRID.sigma[step])
    return (sigma - alpha) / (alpha * alpha + sigma * sigma) * x


def toy_run(settings: FKSettings, particles: int, seed: int, shift: float = 0.0) -> tuple[Tensor, FKState]:
    """Samples (N,) of reward x + shift, and their weights."""
    kernel, source = DDIM(1.0), torch.Generator().manual_seed(seed)
    state = FKState(settings, torch.zeros(particles, dtype=torch.long), STEPS, seed)
    scored = settings.scoring_steps(STEPS)
    x = torch.randn(particles, 1, generator=source)
    for index in range(STEPS):
        v = prediction(x, index)
        preview = PATH.x0(x, v, GRID[index])
        x = transition(PATH, kernel, x, v, GRID[index]).sample(torch.randn(particles, 1, generator=source))
        if index in scored:
            state.weigh((x if index == STEPS - 1 else preview)[:, 0] + shift, index)
            ancestors = state.resample()
            x = x if ancestors is None else x[ancestors]
    return x[:, 0].double(), state


@cache
def moments(settings: FKSettings) -> Moment:
    rows = []
    for seed in SEEDS:
        x, state = toy_run(settings, PARTICLES, seed)
        weights = normalized_weights(state.log_weights)
        mean = (weights * x).sum()
        rows.append(torch.stack([mean, (weights * (x - mean) ** 2).sum().sqrt()]))
    return Moment(*torch.stack(rows).mean(0).tolist())


def exact_sd() -> float:
    """Of the samples without steering: every move is x -> a x + s noise."""
    variance = 1.0
    for index in range(STEPS):
        one = torch.ones(1, 1, dtype=torch.float64)
        move = transition(PATH, DDIM(1.0), one, prediction(one, index), GRID[index])
        variance = float(move.mean) ** 2 * variance + float(move.std) ** 2
    return math.sqrt(variance)


def test_unsteered_toy_is_gaussian() -> None:
    assert exact_sd() == pytest.approx(0.9239, abs=5e-5)
    assert TOY.scoring_steps(STEPS) == SCORED


@pytest.mark.parametrize("potential", ["difference", "max"])
@pytest.mark.parametrize("ess", [EVERY_TIME, SOMETIMES])
def test_potentials_reach_the_tilted_gaussian(potential: Potential, ess: float | None) -> None:
    _require_tilted(replace(TOY, potential=potential, resampler="systematic", ess=ess))


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_resamplers_reach_the_tilted_gaussian(resampler: ResamplerName) -> None:
    _require_tilted(replace(TOY, resampler=resampler))


def _require_tilted(settings: FKSettings) -> None:
    found = moments(settings)
    assert found.mean == pytest.approx(0.854, abs=0.01) and found.sd == pytest.approx(0.923, abs=0.01)


def test_tempering_reaches_the_tilted_gaussian() -> None:
    _require_tilted(replace(TOY, gamma=0.016, resampler="systematic", ess=EVERY_TIME))


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_lam_0_does_not_steer(potential: Potential) -> None:
    for ess in (EVERY_TIME, SOMETIMES):
        x, state = toy_run(replace(TOY, lam=0.0, potential=potential, ess=ess), 20_000, seed=0)
        assert torch.equal(
            normalized_weights(state.log_weights), torch.full((20_000,), 1 / 20_000, dtype=torch.float64)
        )
        assert float(x.mean()) == pytest.approx(0, abs=0.03) and float(x.std()) == pytest.approx(0.923, abs=0.02)


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_reward_offset_changes_nothing(potential: Potential) -> None:
    for ess in (EVERY_TIME, SOMETIMES):
        settings = replace(TOY, potential=potential, ess=ess)
        (x, state), (moved, other) = (toy_run(settings, 200, seed=1, shift=shift) for shift in (0.0, -8.0))
        torch.testing.assert_close(moved, x)
        torch.testing.assert_close(
            normalized_weights(other.log_weights), normalized_weights(state.log_weights), rtol=1e-4, atol=1e-9
        )


def state_of(scores: int = 3, total: int = 10, **settings: Any) -> FKState:
    return FKState(FKSettings(**settings), torch.zeros(scores, dtype=torch.long), total, seed=0)


def relative(state: FKState) -> list[float]:
    return (state.log_weights - state.log_weights[0]).tolist()


@pytest.mark.parametrize(
    ("potential", "first", "second"),
    [
        ("difference", [2.0, 6.0, -2.0], [4.0, 2.0, 0.0]),
        ("max", [2.0, 6.0, -2.0], [2.0 + 4.0, 6.0 + 6.0, -2.0 + 0.0]),
        ("sum", [2.0, 6.0, -2.0], [2.0 + 6.0, 6.0 + 8.0, -2.0 - 2.0]),
    ],
)
def test_weight_values(potential: Potential, first: list[float], second: list[float]) -> None:
    state = state_of(lam=2.0, potential=potential)
    state.weigh(torch.tensor([1.0, 3.0, -1.0]), 2)
    assert state.log_weights.tolist() == pytest.approx(first)
    state.weigh(torch.tensor([2.0, 1.0, 0.0]), 4)
    assert state.log_weights.tolist() == pytest.approx(second)
    state.weigh(torch.tensor([-1.0, 0.5, 3.0]), 9)
    assert state.log_weights.tolist() == pytest.approx([-2.0, 1.0, 6.0])  # lam r(x0)


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_copies_inherit_potentials(potential: Potential) -> None:
    state = state_of(lam=2.0, potential=potential, ess=None, resampler="multinomial")
    previews, final = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([1.0, 2.0, 3.0])
    state.weigh(previews, 4)
    ancestors = state.resample()
    assert ancestors is not None
    assert state.log_weights.tolist() == [0.0] * 3
    state.weigh(final, 9)
    assert state.log_weights.tolist() == pytest.approx((2 * final - 2 * previews[ancestors]).tolist())


def test_proposal_log_ratio_is_added() -> None:
    state = state_of(lam=2.0)
    state.weigh(torch.tensor([1.0, 3.0, -1.0]), 2, log_ratio=torch.tensor([0.5, -1.0, 0.0]))
    assert state.log_weights.tolist() == pytest.approx([2.5, 5.0, -2.0])
    state.weigh(torch.tensor([0.0, 0.0, 0.0]), 9, log_ratio=torch.tensor([0.25, 0.0, 0.0]))
    assert state.log_weights.tolist() == pytest.approx([0.75, -1.0, 0.0])
    with pytest.raises(ValueError, match="guide only moves that draw noise"):
        state_of().weigh(torch.zeros(3), 2, log_ratio=torch.tensor([0.0, math.inf, 0.0]))
    with pytest.raises(ValueError, match=r"log_ratio must be \(3,\)"):
        state_of().weigh(torch.zeros(3), 2, log_ratio=torch.zeros(2))


def test_resampling_stays_within_prompt() -> None:
    group = torch.tensor([5, 2, 5, 2, 2, 5, 5])
    source = torch.Generator().manual_seed(0)
    for resampler in RESAMPLERS:
        state = FKState(FKSettings(lam=3.0, ess=None, resampler=resampler), group, 100, seed=0)
        for step in range(20):
            state.weigh(torch.randn(7, generator=source) + 100 * group, step)
            ancestors = state.resample()
            assert ancestors is not None and ancestors.dtype == torch.long
            assert torch.equal(group[ancestors], group)


def test_effective_size_is_per_prompt() -> None:
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    state = FKState(FKSettings(lam=1.0), group, 10, seed=0)
    state.weigh(torch.tensor([0.0, 0.0, 0.1, 20.0, 0.2, 0.0]), 3)
    ancestors = state.resample()
    assert ancestors is not None and ancestors.tolist() == [0, 3, 2, 3, 4, 3]
    assert state.log_weights.tolist() == pytest.approx([0.0, 0.0, 0.1, 0.0, 0.2, 0.0])
    assert state.resample() is None


def test_resampling_does_not_depend_on_other_prompts() -> None:
    scores = torch.randn(16, generator=torch.Generator().manual_seed(0))
    settings = FKSettings(lam=1.0, ess=None, resampler="multinomial")
    both = FKState(settings, torch.tensor([0] * 8 + [1] * 8), 10, seed=4)
    alone = FKState(settings, torch.ones(8, dtype=torch.long), 10, seed=4)
    both.weigh(scores, 3)
    alone.weigh(scores[8:], 3)
    together, apart = both.resample(), alone.resample()
    assert together is not None and apart is not None
    assert torch.equal(together[8:] - 8, apart) and not torch.equal(together[:8], apart)


def test_nan_score_has_no_weight_until_next_score(caplog: pytest.LogCaptureFixture) -> None:
    state = state_of(lam=2.0)
    with caplog.at_level(logging.WARNING):
        state.weigh(torch.tensor([1.0, math.nan, 2.0]), 2)
    assert "1 of 3 scores at step 2 are not finite" in caplog.text
    assert state.log_weights.tolist() == [2.0, -math.inf, 4.0]
    state.weigh(torch.tensor([1.0, 3.0, math.inf]), 4)
    assert state.log_weights.tolist() == [2.0, 6.0, -math.inf]


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_nan_particle_has_no_offspring(potential: Potential) -> None:
    state = state_of(lam=0.1, potential=potential, ess=None)
    state.weigh(torch.tensor([1.0, math.nan, 2.0]), 2)
    ancestors = state.resample()
    assert ancestors is not None and 1 not in ancestors.tolist()
    assert state.log_weights.tolist() == [0.0] * 3
    state.weigh(torch.tensor([1.0, 1.0, 1.0]), 9)
    assert bool(state.log_weights.isfinite().all())


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_step_with_all_nan_scores_is_ignored(potential: Potential) -> None:
    state, other = state_of(lam=2.0, potential=potential), state_of(lam=2.0, potential=potential)
    state.weigh(torch.full((3,), math.nan), 1)
    assert state.resample() is None
    for either in (state, other):
        either.weigh(torch.tensor([1.0, math.nan, 2.0]), 2)
    state.weigh(torch.full((3,), -math.inf), 4)
    assert torch.equal(state.log_weights, other.log_weights)


def test_argmax_selects_by_reward_alone() -> None:
    group = torch.tensor([1, 0, 1, 0, 1])
    state = FKState(FKSettings(lam=2.0), group, 10, seed=0)
    state.weigh(torch.tensor([9.0, 0.0, 0.0, 9.0, 0.0]), 2)
    with pytest.raises(ValueError, match="as step 9"):
        state.choose()
    state.weigh(torch.tensor([math.nan, 1.0, 3.0, 1.0, 2.0]), 9)
    assert state.resample() is None
    assert state.choose().tolist() == [1, 2]


def test_final_sample_is_drawn_by_weight() -> None:
    size = 3000
    group, final = torch.arange(size).repeat_interleave(3), torch.tensor([0.0, math.log(3.0), -math.inf]).repeat(size)
    state = FKState(FKSettings(lam=1.0, terminal="weighted"), group, 10, seed=0)
    state.weigh(final, 9)
    chosen = state.choose()
    assert torch.equal(group[chosen], torch.arange(size)) and bool((chosen % 3 < 2).all())
    assert float((chosen % 3).double().mean()) == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / size))
    for settings, count in ((FKSettings(terminal="weighted"), 1), (FKSettings(), 1)):
        nothing = FKState(settings, torch.zeros(4, dtype=torch.long), 10, seed=0)
        nothing.weigh(torch.full((4,), math.nan), 9)
        assert len(nothing.choose()) == count


def test_scoring_steps() -> None:
    assert FKSettings().scoring_steps(100) == (20, 40, 60, 80, 99)
    assert FKSettings().scoring_steps(10) == (2, 4, 6, 9)  # 8 is the last but one
    assert FKSettings(start=0.0, stop=1.0, every=0.01).scoring_steps(6) == (0, 1, 2, 3, 5)
    assert FKSettings(start=0.3, stop=0.3).scoring_steps(10) == (3, 9)
    with pytest.raises(ValueError, match="take more steps"):
        FKSettings().scoring_steps(2)


def test_lam_is_tempered_up_to_last_step() -> None:
    assert FKSettings(lam=10.0).strength(3, 100) == 10.0
    tempered = FKSettings(lam=10.0, gamma=0.008)
    assert tempered.strength(0, 100) == pytest.approx(0.08)
    assert tempered.strength(49, 100) == pytest.approx(10 * (1.008**50 - 1))
    assert tempered.strength(87, 100) == tempered.strength(99, 100) == 10.0
    assert tempered.strength(9, 10) == 10.0
    state = state_of(lam=10.0, gamma=0.5)
    state.weigh(torch.tensor([1.0, 0.0, 0.0]), 0)
    assert relative(state) == pytest.approx([0.0, -5.0, -5.0])
    state.weigh(torch.tensor([2.0, 0.0, 1.0]), 9)
    assert relative(state) == pytest.approx([0.0, -20.0, -10.0])


def test_deterministic_kernel_is_refused() -> None:
    for kernel in (ODE(), DDIM(0.0), CPS(0.0)):
        with pytest.raises(ValueError, match=r"stay identical.*DDIM\(1.0\), or Prune"):
            require_stochastic(kernel, GRID)
    for stochastic in (DDIM(1.0), FlowSDE(), CPS(0.5)):
        require_stochastic(stochastic, GRID)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"particles": 0}, "particles"),
        ({"lam": -1.0}, "negate the reward"),
        ({"lam": math.nan}, "lam"),
        ({"potential": "min"}, "difference, max, sum"),
        ({"resampler": "best"}, "multinomial, stratified, systematic, residual, ssp"),
        ({"terminal": "both"}, "argmax, weighted"),
        ({"ess": 0.0}, "None for every time"),
        ({"ess": 1.5}, "None for every time"),
        ({"start": 0.9}, "fractions of the steps"),
        ({"stop": 1.5}, "fractions of the steps"),
        ({"every": 0.0}, "fractions of the steps"),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FKSettings(**settings)


def test_invalid_inputs_are_refused() -> None:
    for group in (torch.zeros(3), torch.zeros(0, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="prompt indices"):
            FKState(FKSettings(), group, 10, seed=0)
    state = state_of()
    with pytest.raises(ValueError, match="one per particle"):
        state.weigh(torch.zeros(3, 1), 2)
    state.weigh(torch.zeros(3), 2)
    for step in (2, 1, 10):
        with pytest.raises(ValueError, match="make a new FKState"):
            state.weigh(torch.zeros(3), step)
