"""Consistency distillation, against the exact consistency function of a Gaussian (fixtures F11 and F27)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from genalign.algorithms.consistency_distillation import (
    ConsistencyObjective,
    boundary_weights,
    consistency_function,
    long_step,
    pseudo_huber,
)
from genalign.algorithms.interfaces import MetricSums, TermCounts, TermScales, UpdateBatch, UpdateContext
from genalign.diffusion.paths import EDMPath, FlowPath, VPPath
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import Rollout, RolloutInputs, rollout
from genalign.diffusion.transitions import CPS, ODE
from genalign.types import Conditioning, NoiseLevel, Path
from pipelines import SD3
from tests.genalign.algorithms.gaussian_chain import MEAN, SPREAD, GaussianChain
from tests.genalign.algorithms.updates import flat_gradient, update_batch, update_context


class Student(nn.Module):
    """A weight that leads from the teacher, at 0, to the exact consistency function, at 1; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def float(self) -> Student:
        return self


class GaussianStudent(GaussianChain):
    """The Gaussian of ``GaussianChain``: its exact network, and the one that implies its exact consistency function."""

    def __init__(self, path: Path, levels: Sequence[float]) -> None:
        super().__init__(path, levels)
        self.denoiser = Student()  # type: ignore[assignment]
        self.guidances = list[float]()

    def consistent(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Where the path through x ends: m + s / sqrt(S) (x - alpha m)."""
        alpha, sigma = (value.reshape(-1, 1) for value in (level.alpha, level.sigma))
        return MEAN + SPREAD / (alpha**2 * SPREAD**2 + sigma**2).sqrt() * (x - alpha * MEAN)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning | None, guidance: float = 1.0) -> Tensor:
        self.guidances.append(guidance)
        alpha, sigma = (value.reshape(-1, 1) for value in (level.alpha, level.sigma))
        mean = MEAN + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * MEAN)  # of the posterior
        end = self.consistent(x, level)
        if isinstance(self.path, VPPath):
            skip, out = (value.reshape(-1, 1) for value in boundary_weights(level.timestep))
            end = (end - skip * x) / out
        x0 = mean + self.denoiser.share * (end - mean)
        eps = (x - alpha * x0) / torch.where(sigma > 0, sigma, 1.0)
        return eps if isinstance(self.path, VPPath) else eps - x0


def losses_of(objective: ConsistencyObjective, toy: GaussianStudent, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The losses of the exact student, from x = 1.3 at the first level of the grid."""
    policy = Policy(toy.denoiser, None)
    with torch.no_grad():
        toy.denoiser.share.fill_(1.0)  # type: ignore[union-attr, operator]
    level = toy.level(toy.levels[:1])
    noise = (1.3 - level.alpha) / level.sigma  # of the sample x0 = 1
    monkeypatch.setattr(
        "genalign.algorithms.consistency_distillation.seeded_noise", lambda seeds, like: noise.expand_as(like)
    )
    monkeypatch.setattr("genalign.algorithms.tails.Mover.seeds", lambda self, seed, name: [0] * len(self.rows))
    inputs = RolloutInputs(toy.encode(["a"]), torch.zeros(1, dtype=torch.long), (1,), (0,))
    final = torch.ones(1, 1, dtype=torch.float64)
    batch = UpdateBatch(
        Rollout(inputs, (), final[:, None][:, :0], final[:, None][:, :0], final), torch.ones(1), torch.zeros(1), True
    )
    context = UpdateContext(toy, policy, toy.grid(4), ODE(), 1.0, None, MetricSums(), memory=policy.snapshot())
    objective.backward(context, batch, TermScales.of_means(objective.terms(batch)), seed=0)
    return torch.tensor(context.metrics.mean("loss"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("move", "residual"), [(0.1, 0.0220310190804), (0.05, 0.00519198850761), (0.025, 0.00125499693598)]
)
def test_the_residual_of_the_exact_student_is_the_error_of_the_teachers_move(
    move: float, residual: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O(h^2): half a move leaves a quarter of it."""
    toy = GaussianStudent(FlowPath(), (0.6, 0.6 - move))
    loss = losses_of(ConsistencyObjective(huber=1e-3), toy, monkeypatch)
    torch.testing.assert_close(loss, torch.tensor(math.hypot(residual, 1e-3) - 1e-3).double(), rtol=0, atol=1e-8)


def test_the_last_move_ends_at_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """From sigma = 0.6 in one move to 0, or in two with a skip past the end: the target is the moved sample."""
    x, toy = torch.tensor([[1.3]], dtype=torch.float64), GaussianStudent(FlowPath(), (0.6, 0.3))
    level = toy.level(toy.levels[:1])
    moved = x - 0.6 * toy.predict(x, level, None).detach()  # by the teacher, whose share is 0
    residual = float((toy.consistent(x, level) - moved).abs())
    loss = losses_of(ConsistencyObjective(skip=3), toy, monkeypatch)
    assert float(loss) == pytest.approx(math.hypot(residual, 1e-3) - 1e-3, abs=1e-8)


def test_the_guided_teacher_moves_and_the_student_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = GaussianStudent(FlowPath(), (0.6, 0.3))
    losses_of(ConsistencyObjective(guidance=4.0), toy, monkeypatch)
    assert toy.guidances == [4.0, 1.0, 1.0]  # teacher, target, student


def test_the_weights_at_the_boundary() -> None:
    timesteps = torch.tensor([0.0, 1.0, 20.0, 519.0, 999.0], dtype=torch.float64)
    skip, out = boundary_weights(timesteps)
    skips = [1.0, 0.00249376558603, 6.24996093774e-06, 9.28122473854e-09, 2.50500750374e-09]
    assert skip.tolist() == pytest.approx(skips, rel=1e-10)
    outs = [0.0, 0.998752338878, 0.999996875015, 0.999999995359, 0.999999998747]
    assert out.tolist() == pytest.approx(outs, abs=1e-11)


@pytest.mark.parametrize(
    ("path", "level"),
    [
        (FlowPath(), NoiseLevel(*torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))),
        (EDMPath(), NoiseLevel(*torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))),
        (VPPath(), NoiseLevel(*torch.tensor([0.0, 0.9995, math.sqrt(1 - 0.9995**2)], dtype=torch.float64))),
        (VPPath("v_prediction"), NoiseLevel(*torch.tensor([0.0, 0.9995, math.sqrt(1 - 0.9995**2)]).double())),
    ],
)
def test_the_consistency_function_is_the_identity_at_the_boundary(path: Path, level: NoiseLevel) -> None:
    """Bit for bit: on a flow at sigma = 0, and on a VP path at its first timestep, whose noise is not 0."""
    generator = torch.Generator().manual_seed(0)
    x, prediction = torch.randn(2, 4, 3, generator=generator).unbind(0)
    assert torch.equal(consistency_function(path, x, prediction, level), x)


def test_the_pseudo_huber_loss() -> None:
    difference = torch.tensor([[0.0], [1e-3], [0.5]], dtype=torch.float64)
    expected = [0.0, 0.000414213562373, 0.499000999999]
    assert pseudo_huber(difference, 1e-3).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_move_over_several_steps_stops_at_the_end_of_the_grid() -> None:
    grid = GaussianChain(FlowPath(), (1.0, 0.75, 0.5, 0.25)).grid(4)
    step = long_step(grid, torch.tensor([0, 2, 3]), skip=2)
    assert step.sigma.tolist() == [1.0, 0.5, 0.25] and step.sigma_next.tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize(("share", "variance"), [(1.0, 0.64), (0.0, 0.19562204798)])
def test_a_consistent_student_keeps_the_distribution_at_any_grid(share: float, variance: float) -> None:
    """Noising the clean estimate again shrinks the spread where that is the mean of the posterior.

    Every move is affine: the mean and the variance follow from the moves of 0 and of 1.
    """
    for levels in ((1.0, 0.75, 0.5, 0.25), (1.0, 0.4)):
        toy = GaussianStudent(FlowPath(), levels)
        with torch.no_grad():
            toy.denoiser.share.fill_(share)  # type: ignore[union-attr, operator]
        mean, spread, grid = 0.0, 1.0, toy.grid(4)
        for index in range(len(grid)):
            ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
            x0 = toy.path.x0(ends, toy.predict(ends, grid[index], None), grid[index])
            zero, one = x0[:, 0].tolist()
            kept, noise = float(grid.alpha[index + 1]), float(CPS(1.0)(grid[index]).s)
            mean = kept * (zero + (one - zero) * mean)
            spread = (kept * (one - zero)) ** 2 * spread + noise**2
        if share or len(levels) == 4:
            assert (mean, spread) == pytest.approx((MEAN, variance), abs=1e-8)


def test_the_sampler_of_the_student_is_cps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rollout itself, of many samples: N(0.5, 0.64) in two steps."""
    toy = GaussianStudent(FlowPath(), (1.0, 0.4))
    with torch.no_grad():
        toy.denoiser.share.fill_(1.0)  # type: ignore[union-attr, operator]
    count = 4000
    noise = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(toy, "initial_noise", lambda seeds: noise)
    seeds = tuple(range(count))
    inputs = RolloutInputs(toy.encode(["a"]), torch.zeros(count, dtype=torch.long), seeds, seeds)
    final = rollout(toy, inputs, toy.grid(2), [CPS(1.0)] * 2, 1.0).final
    assert float(final.mean()) == pytest.approx(0.5, abs=0.04) and float(final.var()) == pytest.approx(0.64, abs=0.05)


def test_the_gradient_does_not_depend_on_the_micro_batch(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    context = replace(context, memory=context.policy.snapshot())
    objective, batch = ConsistencyObjective(steps=4, guidance=2.0, draws=2), update_batch(context)
    assert objective.terms(batch) == TermCounts(6, 0)  # one of the four samples has no credit
    scales = TermScales.of_means(objective.terms(batch))
    objective.backward(context, batch, scales, seed=3)
    whole = flat_gradient(context)
    for part in batch.split(1):
        objective.backward(context, part, scales, seed=3)
    torch.testing.assert_close(flat_gradient(context), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    assert whole.abs().max() > 0
    with pytest.raises(ValueError, match="give the recipe a memory"):
        objective.backward(replace(context, memory=None), batch, scales, seed=3)


def test_settings_that_cannot_work_are_refused() -> None:
    for settings in ({"skip": 0}, {"skip": 50}, {"draws": 0}):
        with pytest.raises(ValueError, match="skip must be at least 1 and below steps"):
            ConsistencyObjective(**settings)
    for wrong in ({"huber": 0.0}, {"guidance": 0.5}):
        with pytest.raises(ValueError, match="huber must be positive and guidance 1 for none, or more"):
            ConsistencyObjective(**wrong)  # type: ignore[arg-type]
