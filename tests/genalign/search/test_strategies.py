"""Searches on the tiny pipeline: what they return, what they cost, and what they refuse."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.diffusion.transitions import DDIM, ODE
from genalign.runtime.progress import Progress
from genalign.scoring.score import NamedReward, RewardError
from genalign.search import (
    DNO,
    Beam,
    BestOfN,
    Budget,
    DoobGuide,
    Evolution,
    FKSteering,
    Prune,
    ReNO,
    RewardGradient,
    ZeroOrder,
    run_search,
    search,
)
from genalign.search.engine import Particles, ScoredParticles, SearchRun
from genalign.search.noise_search import neighbors_of
from genalign.search.pruning import PruneSchedule
from genalign.search.ranking import largest_per_prompt, ranking_values
from genalign.search.strategy import Strategy, count_calls
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.search.tiny_searches import PROMPTS, SAMPLING, redness, search_run


@pytest.fixture
def tiny(small: SD3) -> SD3:
    return small


def detached(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return redness(samples, prompts).detach()


STRATEGIES: dict[str, Strategy] = {
    "best of n": BestOfN(5),
    "best of n by a stochastic kernel": BestOfN(5, DDIM(1.0)),
    "beam": Beam(2, 3),
    "pruning": Prune((0, 2), (0.5, 0.5), 6),
    "zero-order": ZeroOrder(2, 3),
    "evolution": Evolution((0, 1, 3), (4, 3, 2), 2),
    "FK steering": FKSteering(3, lam=5.0),
    "FK steering by gradients": FKSteering(3, lam=5.0, guide=RewardGradient()),
    "FK steering by Doob's transform": FKSteering(3, lam=5.0, guide=DoobGuide(4)),
    "reno": ReNO(3, recompute=True),
    "dno": DNO(3),
    "reno after pruning": ReNO(3, initial_search=Prune((0,), (0.5,), 4)),
}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_ledger_equals_count_and_model_calls(tiny: SD3, strategy: Strategy, guidance: float) -> None:
    run = search_run(tiny, guidance)
    true: Counter[str] = Counter()
    tiny.denoiser.register_forward_hook(lambda module, inputs, output: true.update(forward=len(output[0])))
    finished = strategy(run, None)
    assert run.ledger.nfe == true["forward"]
    counts = count_calls(run, strategy).counts  # of one of the two prompts
    assert run.ledger.counts == {call: 2 * count for call, count in counts.items()}
    assert set(finished.candidates.prompt.tolist()) == {0, 1}
    assert torch.equal(finished.scores[:, 0], redness(finished.samples, []))


@pytest.mark.parametrize("strategy", [BestOfN(), Prune((1, 2), (0.5, 0.5)), ZeroOrder(neighbors=2)], ids=repr)
@pytest.mark.parametrize("nfe", [30, 57, 100])
def test_budget_limits_nfe(tiny: SD3, strategy: Strategy, nfe: int) -> None:
    result = search(tiny, list(PROMPTS), redness, strategy, Budget(nfe=nfe), SAMPLING, batch_size=8)
    assert result.ledger.nfe <= 2 * nfe
    assert 0 <= result.unused < 2 * 5  # less than a round of the zero-order search
    assert result.samples.shape[:2] == (2, 3) and result.scores.shape == (2, 1)


def test_prune_with_oracle_scorer_equals_best_of_n(tiny: SD3) -> None:
    class Oracle:
        def __call__(self, run: SearchRun, candidates: Particles) -> Tensor:
            return run.decoded_scores(run.advance(candidates, run.steps))

    everything = search(tiny, PROMPTS, redness, BestOfN(7), sampling=SAMPLING)
    pruned = search(tiny, PROMPTS, redness, Prune((1, 2), (0.4, 0.4), 7, Oracle()), sampling=SAMPLING)
    torch.testing.assert_close(pruned.scores, everything.scores, rtol=0, atol=1e-5)
    assert pruned.winners == everything.winners


def test_prune_that_keeps_all_adds_only_scoring_calls(tiny: SD3) -> None:
    everything = search(tiny, PROMPTS, redness, BestOfN(4), sampling=SAMPLING)
    unpruned = search(tiny, PROMPTS, redness, Prune((1, 3), (1.0, 1.0), 4), sampling=SAMPLING)
    assert torch.equal(unpruned.samples, everything.samples)
    extra = unpruned.ledger.since(everything.ledger).counts
    assert extra == {"nfe": 0, "decode": 2 * 2 * 4, "reward/reward": 2 * 2 * 4}


def test_sample_does_not_depend_on_batch(tiny: SD3) -> None:
    many = search(tiny, PROMPTS[0], redness, BestOfN(6, DDIM(1.0)), sampling=SAMPLING, batch_size=4)
    grid, rewards = SAMPLING.grid(tiny), [NamedReward("red", redness)]
    run = SearchRun(tiny, [Prompt(PROMPTS[0])], rewards, grid, 1.0, 1, "0/0")
    alone = run.finish(run.advance(run.start(6).rows(torch.tensor(many.winners)), 5, DDIM(1.0)))
    torch.testing.assert_close(alone.samples, many.samples, rtol=0, atol=1e-4)


def test_prune_ranks_within_each_prompt(tiny: SD3) -> None:
    run = search_run(tiny)
    finished = Prune((1,), (0.5,), 4)(run, None)
    assert finished.candidates.prompt.tolist() == [0, 0, 1, 1]
    assert Counter(node.prompt for node in run.lineage.nodes if node.end_step == 2) == {0: 2, 1: 2}


def test_a_search_shows_how_many_of_its_nfe_are_done(
    tiny: SD3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_search, "Progress", lambda: Progress(seconds=0.0))
    caplog.set_level(logging.INFO, "genalign")
    for prompts, name in (
        (PROMPTS, "searching"),
        (["a circle that is " + 9 * "very " + "red"], "a circle that is very very very very ..."),
    ):
        caplog.clear()
        result = search(tiny, prompts, redness, Prune((0, 2), (0.5, 0.5), 6), sampling=SAMPLING)
        total = sum(one.ledger.nfe for one in result.per_prompt)
        lines = [record.message for record in caplog.records if record.name == "genalign.runtime.progress"]
        assert lines[0] == f"{name} 0/{total} NFE"
        assert len(lines) > 2 and lines[-1].startswith(f"{name} {total}/{total} NFE (")


def test_a_strategy_that_needs_values_is_searched_with_though_its_calls_cannot_be_counted(tiny: SD3) -> None:
    def first_value(run: SearchRun, budget: Budget | None) -> ScoredParticles:
        found = BestOfN(2)(run, budget)
        float(found.samples.flatten()[0])  # the twin that counts calls has none
        return found

    assert search(tiny, PROMPTS[0], redness, first_value, sampling=SAMPLING).scores.numel()


def test_search_raises_mean_score(tiny: SD3) -> None:
    single = search(tiny, PROMPTS, redness, BestOfN(1), sampling=SAMPLING).scores
    for strategy in (BestOfN(12), Prune((2,), (0.5,), 12), ZeroOrder(3, 4), Evolution((0, 1), (6, 6)), Beam(2, 4)):
        assert search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING).scores.mean() > single.mean()


def test_lineage_records_scores_and_last_steps(tiny: SD3) -> None:
    result = search(tiny, PROMPTS, redness, Prune((0, 2), (0.5, 0.5), 8), sampling=SAMPLING)
    assert len(result.lineage) == 16
    assert Counter(node["ended"] for node in result.lineage) == {1: 8, 3: 4, 5: 4}
    for place, name in enumerate(result.winners):
        node = result.lineage[name]
        assert node["prompt"] == place and [step for step, _ in node["scores"]] == [1, 3, 5]
        assert node["scores"][-1][1] == pytest.approx(result.scores[place].tolist())


def test_several_rewards_are_ranked_by_rank_sum(tiny: SD3) -> None:
    rewards = {"red": redness, "not red": lambda samples, prompts: -redness(samples, prompts)}
    result = search(tiny, PROMPTS, rewards, Prune((1,), (0.5,), 6), sampling=SAMPLING)
    assert result.scores.shape == (2, 2)
    scores = torch.tensor([[1.0, 100.0], [2.0, 0.0], [3.0, 50.0], [math.nan, 200.0]])
    same = torch.zeros(4, dtype=torch.long)
    assert ranking_values(scores, same).tolist() == [1 + 2, 2 + 0, 3 + 1, 0 + 3]
    assert largest_per_prompt(torch.tensor([1.0, 2.0, 2.0, -math.inf]), same, 3).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "strategy",
    [BestOfN(6), Prune((1,), (0.5,), 6), Beam(1, 3), ZeroOrder(2, 2), Evolution((0, 1), (4, 2))],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_reported_reward_chooses_nothing(tiny: SD3, strategy: Strategy) -> None:
    rewards = [NamedReward("red", redness), NamedReward("shown", lambda x, texts: -redness(x, texts), weight=0.0)]
    alone, both = (search(tiny, PROMPTS, some, strategy, sampling=SAMPLING) for some in (rewards[:1], rewards))
    assert both.winners == alone.winners and torch.equal(both.samples, alone.samples)
    assert torch.equal(both.scores[:, 1], -both.scores[:, 0])


def test_a_reward_of_negative_weight_should_be_low() -> None:
    scores, same = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 6.0]]), torch.zeros(3, dtype=torch.long)
    assert ranking_values(scores, same, (-1.0, 0.0)).tolist() == [-1.0, -2.0, -3.0]
    assert ranking_values(scores, same, (0.5, -2.0)).tolist() == [0 + 1, 1 + 2, 2 + 0]


def test_neighbors_have_length_and_angle() -> None:
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)
    neighbors = neighbors_of(center, torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64), 0.95)
    flat, others = center.flatten(), neighbors.flatten(1)
    torch.testing.assert_close(others.norm(dim=1), flat.norm().expand(5), rtol=1e-12, atol=0)
    cosines = others @ flat / (others.norm(dim=1) * flat.norm())
    torch.testing.assert_close(cosines, torch.full((5,), 0.95, dtype=torch.float64), rtol=0, atol=1e-6)


def test_cost_of_published_schedule() -> None:
    """x = 9.9, y = 1.2, 20 steps: 61.764 by the nfe that a preview takes (public code counts 51.864)."""
    candidates = 1_000_000
    alive = [count / candidates for count in PruneSchedule((2, 6, 11), (0.4, 0.4, 0.5)).counts(candidates)]
    moves = [end - begin for begin, end in itertools.pairwise((0, 3, 7, 12, 20))]
    cost = sum(share * (steps * 9.9 + 1.2) for share, steps in zip(alive, moves, strict=True))
    assert cost == pytest.approx(61.764, abs=1e-3)


@pytest.mark.parametrize(
    ("keep", "counts"), [((0.4,), (3, 2)), ((0.5,), (5, 3)), ((0.3,), (10, 3)), ((0.1, 0.1), (1, 1, 1))]
)
def test_prune_counts_round_up(keep: tuple[float, ...], counts: tuple[int, ...]) -> None:
    assert PruneSchedule((1, 2)[: len(keep)], keep).counts(counts[0]) == counts


@pytest.mark.parametrize(
    ("build", "changed", "message"),
    [
        (BestOfN, {}, "say how many candidates, or give a budget"),
        (lambda: BestOfN(0), {}, "candidates must be at least 1, not 0"),
        (BestOfN, {"budget": Budget(nfe=1e12)}, "allows more than 4096 candidates at its prices"),
        (
            BestOfN,
            {"budget": Budget(cost=1.0, prices={"nfe": 0.0, "decode": 0.0, "reward/reward": 0.0})},
            "allows more than 4096 candidates at its prices",
        ),
        (BestOfN, {"budget": Budget(nfe=3)}, r"candidates=1 costs 5 .* budget is 3: raise the budget"),
        (
            lambda: BestOfN(10**9),
            {"budget": Budget(nfe=30)},
            "are too many to count against a budget: take at most 4096",
        ),
        (lambda: BestOfN(9), {"budget": Budget(nfe=30)}, r"candidates=9 costs 45 .* budget is 30"),
        (lambda: Prune((1, 4), (0.5, 0.5), 4), {}, "step 4 is past the end: of 5 steps, 0 to 3"),
        (lambda: Prune((2, 1), (0.5, 0.5), 4), {}, "steps must ascend"),
        (lambda: Prune((1,), (0.0,), 4), {}, r"shares in \(0, 1\]"),
        (lambda: Beam(kernel=ODE()), {}, "all proposals would be equal"),
        (lambda: BestOfN(1), {"prompts": []}, "no prompt"),
        (lambda: FKSteering(4, kernel=ODE()), {}, "moves without noise"),
        (lambda: FKSteering(4, kernel=None), {}, "needs a kernel to move particles by"),
        (
            lambda: FKSteering(2, 1.0, guide=RewardGradient()),
            {"reward": detached},
            "has no gradient: .* or the guide DoobGuide",
        ),
        (lambda: ReNO(2), {"reward": detached}, "has no gradient: .* the strategies ZeroOrder and Evolution"),
    ],
)
def test_invalid_search_is_refused(
    tiny: SD3, build: Callable[[], Strategy], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search(
            **{"pipeline": tiny, "prompts": PROMPTS, "reward": redness, "sampling": SAMPLING, **changed},
            strategy=build(),
        )


def test_reward_that_reorders_samples_is_refused(tiny: SD3) -> None:
    def sorting(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return redness(samples, prompts).sort().values

    with pytest.raises(RewardError, match="in the order of the samples"):
        search(tiny, PROMPTS, sorting, BestOfN(2), sampling=SAMPLING)
    with pytest.raises(RewardError, match="returned shape"):
        search(tiny, PROMPTS, lambda samples, prompts: redness(samples, prompts)[:1], BestOfN(2), sampling=SAMPLING)


def test_nan_scores_rank_last(tiny: SD3) -> None:
    def moody(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = redness(samples, prompts)
        return torch.where(scores > scores.mean(), math.nan, scores) if len(scores) > 2 else scores

    assert search(tiny, PROMPTS, moody, BestOfN(6), sampling=SAMPLING).scores.isfinite().all()


def test_budget_in_seconds_prices_the_gradients_that_a_strategy_follows(tiny: SD3) -> None:
    result = search(tiny, PROMPTS[0], redness, ReNO(learning_rate=1.0), Budget(seconds=1.0), SAMPLING, batch_size=2)
    assert result.budget is not None and result.budget.prices is not None
    backward = {call for call in result.budget.prices if call.endswith(" backward")}
    assert backward == {"nfe backward", "decode backward", "reward/reward backward"}
    assert result.ledger.counts["nfe backward"] > 0 and result.unused >= 0


def test_evolution_spends_a_budget(tiny: SD3) -> None:
    assert [Evolution((0, 1, 3), None).of_size(size).sizes for size in (1, 6, 7, 9)] == [
        (2, 1, 1),
        (3, 2, 1),
        (4, 2, 1),
        (5, 2, 2),
    ]
    assert Evolution((0,), None, elites=1).of_size(5).sizes == (5,)
    result = search(tiny, PROMPTS, redness, Evolution((0, 1, 3), None), Budget(nfe=60), SAMPLING)
    assert 55 < result.ledger.nfe / 2 <= 60
    with pytest.raises(ValueError, match="say how many candidates, or give a budget"):
        search(tiny, PROMPTS, redness, Evolution((0, 1), None), sampling=SAMPLING)


def test_budget_in_seconds_measures_prices(tiny: SD3) -> None:
    result = search(tiny, PROMPTS[0], redness, BestOfN(), Budget(seconds=0.5), SAMPLING, batch_size=2)
    assert result.budget is not None and result.budget.prices is not None
    assert set(result.budget.prices) == {"nfe", "decode", "reward/reward"}
    assert result.unused >= 0 and len(result.lineage) > 1
    with pytest.raises(ValueError, match="give one positive limit"):
        Budget(nfe=3, seconds=1)
    with pytest.raises(ValueError, match="needs prices"):
        Budget(cost=3.0)
