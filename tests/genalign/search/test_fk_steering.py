"""Feynman-Kac steering: weights and resampling on exact Gaussian data, and particles and guides on pipelines."""

import logging
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from genalign.diffusion.transitions import CPS, DDIM, ODE, FlowSDE, Kernel, transition
from genalign.scoring.score import NamedReward
from genalign.search import BestOfN, Budget, DoobGuide, FKSteering, RewardGradient, search
from genalign.search.engine import Particles, SearchRun
from genalign.search.fk_steering import FKState, Potential, require_stochastic
from genalign.search.guidance import Guidance, Guide, guided_log_ratio
from genalign.search.resampling import RESAMPLERS, normalized_weights
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.search.tiny_searches import PROMPTS, SAMPLING, Gauss, exact_spread, redness

# Data N(0, 1), a flow of 50 steps, reward x, lam 1, previews scored at 9, 16, ..., 44 and the sample at 49.
STEPS, SCORED = 50, (9, 16, 23, 30, 37, 44, 49)
TOY = FKSteering(lam=1.0, start=0.18, stop=0.88, every=0.14, terminal="weighted")
EVERY_TIME, SOMETIMES = None, 0.5
GAUSS, GRID = Gauss(), Gauss().grid(STEPS)
EVERY_POTENTIAL = pytest.mark.parametrize("potential", get_args(Potential))


def toy_run(settings: FKSteering, particles: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Samples (N,) of reward x + shift, and their weights (N,)."""
    source = torch.Generator().manual_seed(seed)
    state = FKState(settings, torch.zeros(particles, dtype=torch.long), STEPS, seed)
    x = torch.randn(particles, 1, generator=source)
    for index in range(STEPS):
        step = GRID[index]
        v = GAUSS.predict(x, step, None)
        preview = GAUSS.path.x0(x, v, step)
        x = transition(GAUSS.path, DDIM(1.0), x, v, step).sample(torch.randn(particles, 1, generator=source))
        if index in settings.scoring_steps(STEPS):
            state.weigh((x if index == STEPS - 1 else preview)[:, 0] + shift, index)
            ancestors = state.resample()
            x = x if ancestors is None else x[ancestors]
    return x[:, 0].double(), normalized_weights(state.log_weights)


def test_unsteered_toy_is_gaussian() -> None:
    assert exact_spread(GRID) == pytest.approx(0.9239, abs=5e-5)
    assert TOY.scoring_steps(STEPS) == SCORED


@pytest.mark.parametrize(
    "settings",
    [
        replace(TOY, resampler="systematic", ess=EVERY_TIME),
        replace(TOY, resampler="systematic", ess=EVERY_TIME, potential="max"),
        replace(TOY, resampler="systematic", potential="max"),
        replace(TOY, resampler="systematic", ess=EVERY_TIME, gamma=0.016),
        *(replace(TOY, resampler=resampler) for resampler in RESAMPLERS),
    ],
)
def test_steering_reaches_the_tilted_gaussian(settings: FKSteering) -> None:
    moments = []
    for seed in range(4):
        x, weights = toy_run(settings, 100_000, seed)
        mean = (weights * x).sum()
        moments.append(torch.stack([mean, (weights * (x - mean) ** 2).sum().sqrt()]))
    assert torch.stack(moments).mean(0).tolist() == pytest.approx([0.854, 0.923], abs=0.01)


@EVERY_POTENTIAL
def test_lam_0_does_not_steer(potential: Potential) -> None:
    for ess in (EVERY_TIME, SOMETIMES):
        x, weights = toy_run(replace(TOY, lam=0.0, potential=potential, ess=ess), 20_000, seed=0)
        assert torch.equal(weights, torch.full((20_000,), 1 / 20_000, dtype=torch.float64))
        assert float(x.mean()) == pytest.approx(0, abs=0.03) and float(x.std()) == pytest.approx(0.923, abs=0.02)


@EVERY_POTENTIAL
def test_reward_offset_changes_nothing(potential: Potential) -> None:
    for ess in (EVERY_TIME, SOMETIMES):
        settings = replace(TOY, potential=potential, ess=ess)
        (x, weights), (moved, other) = (toy_run(settings, 200, seed=1, shift=shift) for shift in (0.0, -8.0))
        torch.testing.assert_close(moved, x)
        torch.testing.assert_close(other, weights, rtol=1e-4, atol=1e-9)


def state_of(group: tuple[int, ...] = (0, 0, 0), **settings: Any) -> FKState:
    return FKState(FKSteering(**settings), torch.tensor(group), 10, seed=0)


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


@EVERY_POTENTIAL
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
    state.weigh(torch.tensor([1.0, 3.0, -1.0]), 2, torch.tensor([0.5, -1.0, 0.0]))
    assert state.log_weights.tolist() == pytest.approx([2.5, 5.0, -2.0])
    state.weigh(torch.tensor([0.0, 0.0, 0.0]), 9, log_ratio=torch.tensor([0.25, 0.0, 0.0]))
    assert state.log_weights.tolist() == pytest.approx([0.75, -1.0, 0.0])
    with pytest.raises(ValueError, match="guide only moves that draw noise"):
        state_of().weigh(torch.zeros(3), 2, log_ratio=torch.tensor([0.0, math.inf, 0.0]))


def test_resampling_stays_within_prompt() -> None:
    group = torch.tensor([5, 2, 5, 2, 2, 5, 5])
    source = torch.Generator().manual_seed(0)
    for resampler in RESAMPLERS:
        state = FKState(FKSteering(lam=3.0, ess=None, resampler=resampler), group, 100, seed=0)
        for step in range(20):
            state.weigh(torch.randn(7, generator=source) + 100 * group, step)
            ancestors = state.resample()
            assert ancestors is not None and ancestors.dtype == torch.long
            assert torch.equal(group[ancestors], group)


def test_effective_size_is_per_prompt() -> None:
    state = state_of((0, 1, 0, 1, 0, 1), lam=1.0)
    state.weigh(torch.tensor([0.0, 0.0, 0.1, 20.0, 0.2, 0.0]), 3)
    ancestors = state.resample()
    assert ancestors is not None and ancestors.tolist() == [0, 3, 2, 3, 4, 3]
    assert state.log_weights.tolist() == pytest.approx([0.0, 0.0, 0.1, 0.0, 0.2, 0.0])
    assert state.resample() is None


def test_resampling_does_not_depend_on_other_prompts() -> None:
    scores = torch.randn(16, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"lam": 1.0, "ess": None, "resampler": "multinomial"}
    both, alone = state_of((0,) * 8 + (1,) * 8, **settings), state_of((1,) * 8, **settings)
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


@EVERY_POTENTIAL
def test_nan_particle_has_no_offspring(potential: Potential) -> None:
    state = state_of(lam=0.1, potential=potential, ess=None)
    state.weigh(torch.tensor([1.0, math.nan, 2.0]), 2)
    ancestors = state.resample()
    assert ancestors is not None and 1 not in ancestors.tolist()
    assert state.log_weights.tolist() == [0.0] * 3
    state.weigh(torch.tensor([1.0, 1.0, 1.0]), 9)
    assert bool(state.log_weights.isfinite().all())


@EVERY_POTENTIAL
def test_step_with_all_nan_scores_is_ignored(potential: Potential) -> None:
    state, other = state_of(lam=2.0, potential=potential), state_of(lam=2.0, potential=potential)
    state.weigh(torch.full((3,), math.nan), 1)
    assert state.resample() is None
    for either in (state, other):
        either.weigh(torch.tensor([1.0, math.nan, 2.0]), 2)
    state.weigh(torch.full((3,), -math.inf), 4)
    assert torch.equal(state.log_weights, other.log_weights)


def test_argmax_selects_by_reward_alone() -> None:
    state = state_of((1, 0, 1, 0, 1), lam=2.0)
    state.weigh(torch.tensor([9.0, 0.0, 0.0, 9.0, 0.0]), 2)
    state.weigh(torch.tensor([math.nan, 1.0, 3.0, 1.0, 2.0]), 9)
    assert state.resample() is None
    assert state.choose().tolist() == [1, 2]


def test_final_sample_is_drawn_by_weight() -> None:
    size = 3000
    group, final = torch.arange(size).repeat_interleave(3), torch.tensor([0.0, math.log(3.0), -math.inf]).repeat(size)
    state = FKState(FKSteering(lam=1.0, terminal="weighted"), group, 10, seed=0)
    state.weigh(final, 9)
    choice = state.choose()
    assert torch.equal(group[choice], torch.arange(size)) and bool((choice % 3 < 2).all())
    assert float((choice % 3).double().mean()) == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / size))
    for nothing in (state_of(terminal="weighted"), state_of()):
        nothing.weigh(torch.full((3,), math.nan), 9)
        assert len(nothing.choose()) == 1


def test_scoring_steps() -> None:
    assert FKSteering().scoring_steps(100) == (20, 40, 60, 80, 99)
    assert FKSteering().scoring_steps(10) == (2, 4, 6, 9)  # 8 is the last but one
    assert FKSteering(start=0.0, stop=1.0, every=0.01).scoring_steps(6) == (0, 1, 2, 3, 5)
    assert FKSteering(start=0.3, stop=0.3).scoring_steps(10) == (3, 9)
    with pytest.raises(ValueError, match="take more steps"):
        FKSteering().scoring_steps(2)


def test_lam_is_tempered_up_to_last_step() -> None:
    """DAS takes the power i for the potential at step i, and i + 1 for the guide's move from there (its code)."""
    assert FKSteering().tempering(3) == 1.0
    tempered = FKSteering(lam=10.0, gamma=0.008)
    assert tempered.tempering(0) == 0.0
    assert tempered.tempering(50) == pytest.approx(1.008**50 - 1)
    assert tempered.tempering(86) < tempered.tempering(87) == 1.0
    state = state_of(lam=10.0, gamma=0.5)
    state.weigh(torch.tensor([1.0, 0.0, 0.0]), 0)
    assert state.log_weights.tolist() == [0.0] * 3
    state.weigh(torch.tensor([1.0, 0.0, 0.0]), 1)
    assert state.log_weights.tolist() == pytest.approx([5.0, 0.0, 0.0])
    state.weigh(torch.tensor([2.0, 0.0, 1.0]), 9)
    assert state.log_weights.tolist() == pytest.approx([20.0, 0.0, 10.0])


def test_guide_is_tempered_by_the_next_power() -> None:
    seen: list[float] = []

    class Note:
        def __call__(self, run: SearchRun, batch: Particles, kernel: Kernel, lam: float) -> Guidance:
            seen.append(lam)
            return Guidance(run.predict(batch), torch.zeros_like(batch.x))

    run = SearchRun(Gauss(), [Prompt("")], [NamedReward("x", lambda x, _: x[:, 0])], Gauss().grid(6), 1.0, 4, "0")
    FKSteering(2, lam=10.0, gamma=0.25, guide=Note())(run, None)
    assert seen == pytest.approx([10 * min(1.25 ** (i + 1) - 1, 1.0) for i in range(5)])


def test_auto_lam_is_two_deviations_of_a_prompts_first_scores() -> None:
    state = state_of(group=(0, 0, 1, 1, 2, 2), lam="auto")
    state.weigh(torch.tensor([1.0, 3.0, 5.0, 5.001, 7.0, 7.0]), 2)
    assert state.lam[:4].tolist() == pytest.approx([2.0, 2.0, 4000.0, 4000.0], rel=1e-3)
    assert bool(state.lam[4:].isnan().all())  # the scores of prompt 2 are equal so far
    assert (state.log_weights[1] - state.log_weights[0]).item() == pytest.approx(4.0)
    assert state.log_weights[4:].tolist() == [0.0, 0.0]
    state.weigh(torch.tensor([1.0, 9.0, 5.0, 5.5, 7.0, 7.2]), 4)
    assert state.lam.tolist() == pytest.approx([2.0, 2.0, 4000.0, 4000.0, 20.0, 20.0], rel=1e-3)
    assert (state.log_weights[5] - state.log_weights[4]).item() == pytest.approx(4.0, rel=1e-4)


@given(
    scores=st.lists(st.floats(-4, 4), min_size=4, max_size=8),
    scale=st.floats(1e-4, 1e4),
    shift=st.floats(-10, 10),
)
def test_auto_lam_does_not_depend_on_the_units_of_the_reward(scores: list[float], scale: float, shift: float) -> None:
    values = torch.tensor(scores, dtype=torch.float64)
    if float(values.std()) < 0.1:
        return
    weights = []
    for these in (values, scale * (values + shift)):
        state = state_of(group=(0,) * len(scores), lam="auto")
        state.weigh(these, 2)
        weights.append(normalized_weights(state.log_weights))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-9)


def test_auto_lam_resamples_rewards_of_any_scale(tiny: SD3, caplog: pytest.LogCaptureFixture) -> None:
    for scale in (1e-3, 1.0, 1e3):
        result = search(
            tiny, PROMPTS, lambda x, p, scale=scale: scale * redness(x, p), FKSteering(8), sampling=SAMPLING
        )
        assert any(node["parent"] is not None for node in result.lineage)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_search_that_never_resampled_says_what_to_try(tiny: SD3, caplog: pytest.LogCaptureFixture) -> None:
    search(tiny, PROMPTS[0], lambda x, p: 1e-4 * redness(x, p), FKSteering(8, lam=10.0), sampling=SAMPLING)
    (line,) = (record.message for record in caplog.records if record.levelno >= logging.WARNING)
    assert "FK steering never resampled" in line and "at lam=10" in line and "\n" not in line
    assert "try lam='auto', or lam=" in line and line.endswith(f"({PROMPTS[0]})")
    caplog.clear()
    search(tiny, PROMPTS[0], lambda x, p: torch.zeros(len(x)), FKSteering(8), sampling=SAMPLING)
    assert "all previews of a prompt scored the same" in caplog.text


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
        ({"lam": math.nan}, "lam must be 'auto', or finite"),
        ({"lam": "automatic"}, "lam must be 'auto', or finite"),
        ({"lam": "auto", "guide": RewardGradient()}, "give lam as a number"),
        ({"potential": "min"}, "difference, max, sum"),
        ({"resampler": "best"}, "multinomial, stratified, systematic, residual, ssp"),
        ({"terminal": "both"}, "argmax, weighted"),
        *(({"ess": ess}, "None for every time") for ess in (0.0, 1.5)),
        *((wrong, "fractions of the steps") for wrong in ({"start": 0.9}, {"stop": 1.5}, {"every": 0.0})),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FKSteering(**settings)


def test_steering_beats_one_sample_and_lam_0_equals_best_of_n(tiny: SD3) -> None:
    plain = search(tiny, PROMPTS, redness, BestOfN(8, DDIM(1.0)), sampling=SAMPLING)
    steered = search(tiny, PROMPTS, redness, FKSteering(8, lam=200.0), sampling=SAMPLING)
    single = search(tiny, PROMPTS, redness, BestOfN(1, DDIM(1.0)), sampling=SAMPLING)
    assert steered.scores.mean() > single.scores.mean()
    nothing = search(tiny, PROMPTS, redness, FKSteering(8, lam=0.0), sampling=SAMPLING)
    torch.testing.assert_close(nothing.scores, plain.scores, rtol=0, atol=1e-5)  # lam 0 weighs all alike


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide", [None, RewardGradient(), RewardGradient(0.5), DoobGuide(8, tau=1.0, gamma=0.5)], ids=repr
)
def test_guide_leaves_target_unchanged(guide: Guide | None) -> None:
    """N(0, s^2) tilted by exp(x) has mean s^2, however its particles were pushed."""
    grid, reward = Gauss().grid(20), NamedReward("x", lambda samples, prompts: samples[:, 0])
    run = SearchRun(Gauss(), [Prompt("")], [reward], grid, 1.0, 4000, "0")
    finished, state = FKSteering(4000, 1.0, guide=guide).steered(run, 4000)
    weights = torch.softmax(state.log_weights, dim=0)
    # 4000 particles of deviation 0.9, of which a third or more count: 0.025 is one standard error
    assert float(weights @ finished.scores[:, 0].double()) == pytest.approx(exact_spread(grid) ** 2, abs=0.075)


def test_guided_log_ratio_values() -> None:
    noise, shift, std = torch.randn(5, 2, 3), torch.randn(5, 2, 3), 0.7
    x = shift + std * noise
    p, q = torch.distributions.Normal(0.0, std), torch.distributions.Normal(shift, std)
    expected = (p.log_prob(x) - q.log_prob(x)).flatten(1).sum(1)
    torch.testing.assert_close(guided_log_ratio(noise, shift, std).float(), expected, rtol=1e-4, atol=1e-4)


def test_guide_raises_reward(tiny: SD3) -> None:
    strategy = FKSteering(2, lam=200.0)
    plain = search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING).scores.mean()
    guided = search(tiny, PROMPTS, redness, replace(strategy, guide=RewardGradient(20.0)), sampling=SAMPLING).scores
    assert guided.mean() > plain


def test_previews_that_the_guide_scored_are_not_scored_again(tiny: SD3) -> None:
    class Silent:
        def __call__(self, run: SearchRun, batch: Particles, kernel: Kernel, lam: float) -> Guidance:
            return replace(RewardGradient(20.0)(run, batch, kernel, lam), scores=None)

    strategy = FKSteering(3, lam=50.0, start=0.0)
    told, silent = (
        search(tiny, PROMPTS, redness, replace(strategy, guide=guide), sampling=SAMPLING)
        for guide in (RewardGradient(20.0), Silent())
    )
    assert torch.equal(told.samples, silent.samples) and told.winners == silent.winners
    for node, other in zip(told.lineage, silent.lineage, strict=True):
        assert [step for step, _ in node["scores"]] == [step for step, _ in other["scores"]]
    early = len(strategy.scoring_steps(5)) - 1
    saved = silent.ledger.since(told.ledger).counts
    assert saved["decode"] == saved["reward/reward"] == 2 * 3 * early > 0 and saved["nfe"] == 0


def test_a_reported_reward_guides_nothing(tiny: SD3) -> None:
    shown = NamedReward("shown", lambda samples, prompts: -redness(samples, prompts).detach(), weight=0.0)
    strategy = FKSteering(2, lam=50.0, guide=RewardGradient(20.0))
    alone, both = (
        search(tiny, PROMPTS, [NamedReward("red", redness), *others], strategy, sampling=SAMPLING)
        for others in ([], [shown])
    )
    assert torch.equal(both.samples, alone.samples)
    assert "reward/shown backward" not in both.ledger.counts


def test_budget_sets_particle_count(tiny: SD3) -> None:
    result = search(tiny, PROMPTS[0], redness, FKSteering(None), Budget(nfe=34), SAMPLING)
    assert result.ledger.nfe == 6 * 5  # six particles of five steps
