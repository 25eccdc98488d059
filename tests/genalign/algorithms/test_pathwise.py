"""Gradients through the sampler, against their closed forms on a Gaussian chain (fixtures F1, F2, F26 and F29)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.pathwise import Ascent, PathwiseObjective
from genalign.algorithms.tails import Chain, DirectAlign, OneStepEstimate, PartialChain, RenoisedCopies, SparseSteps
from genalign.diffusion.transitions import CPS, DDIM, ODE, Kernel, MoveScalars
from genalign.types import NoiseStep
from tests.genalign.algorithms.gaussian_chain import BIAS, MEAN, SLOPE, gaussian_flow, gaussian_vp, gradient_of, reward

ESTIMATES = {  # by step: the mean reward, and its gradient
    0: (-0.3625, (-1.2, 0.1)),
    1: (-0.387355228037, (-0.866833506224, 0.177618261314)),
    2: (-0.556498790072, (-0.57808767774, 0.156120267616)),
}
COPY = (-0.298766324702, 0.0629485657147)
"""The gradient through the last move from a copy of the sample that is noised to its level."""

CHAIN = {
    1: (-0.294820075125, 0.0676039326269),
    2: (-0.633448843366, 0.201422656324),
    3: (-0.939143899086, 0.410789724816),
    4: (-1.17382193434, 0.652358409446),
}


@pytest.mark.parametrize("steps", CHAIN)
def test_the_last_moves_of_a_flow(steps: int) -> None:
    gradient, metrics = gradient_of(PathwiseObjective(Chain()), gaussian_flow(), range(4 - steps, 4))
    assert gradient == pytest.approx(CHAIN[steps], abs=1e-8)
    assert metrics.mean("loss") == pytest.approx(0.716067750847, abs=1e-7)
    assert metrics.mean("endpoint_gap") == 0


class NoisyInTheMiddle(Kernel):
    """CPS with eta 0.5 at the moves 1 and 2, and the ODE at the others."""

    def __call__(self, step: NoiseStep) -> MoveScalars:
        return CPS(0.5)(step) if int(step.index) in (1, 2) else ODE()(step)


def test_a_chain_with_noise_at_some_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of a first noise and those of the two moves, -1 or 1 each: the expectation is exact."""
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    noise = torch.cartesian_prod(signs, signs, signs)

    def of_move(seeds: object, index: int, like: Tensor) -> Tensor:
        return noise[:, index : index + 1]

    for module in ("genalign.diffusion.rollout", "genalign.algorithms.tails"):
        monkeypatch.setattr(f"{module}.step_noise", of_move)
    noises = [1 if first < 0 else 2 for first in noise[:, 0].tolist()]
    objective = PathwiseObjective(Chain())
    gradient, metrics = gradient_of(objective, gaussian_flow(), range(4), NoisyInTheMiddle(), noises)
    assert gradient == pytest.approx((-1.15848453213, 0.424569593865), abs=1e-8)
    assert metrics.mean("loss") == pytest.approx(0.672415346851, abs=1e-7)
    assert metrics.mean("endpoint_gap") == 0


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, (-2.96157831004, 9.33465175546)),
        (2, (-7.24317696305, 26.3382915869)),
        (3, (-93.5188233989, 78.5867808092)),
    ],
)
def test_the_gradient_explodes_with_the_number_of_moves(steps: int, expected: tuple[float, float]) -> None:
    """On the VP path the moves' slopes are far above 1; ``limit`` bounds what reaches the latents."""
    gradient, _ = gradient_of(PathwiseObjective(Chain()), gaussian_vp(), range(3 - steps, 3), DDIM(0.0))
    assert gradient == pytest.approx(expected, rel=1e-8)


def test_a_limit_bounds_the_gradient_at_the_latents() -> None:
    plain, metrics = gradient_of(PathwiseObjective(Chain()), gaussian_vp(), (0, 1, 2), DDIM(0.0))
    longest = metrics.mean("reward_gradient")
    limited, metrics = gradient_of(PathwiseObjective(Chain(), Ascent(limit=1e-3)), gaussian_vp(), (0, 1, 2), DDIM(0.0))
    assert metrics.mean("reward_gradient") == longest > 1  # as it was
    assert max(map(abs, limited)) < 1e-2 * max(map(abs, plain))


@pytest.mark.parametrize("step", range(4))
def test_one_step_estimates(step: int) -> None:
    score, expected = ESTIMATES.get(step, (-0.716067750847, CHAIN[1]))
    gradient, metrics = gradient_of(PathwiseObjective(OneStepEstimate()), gaussian_flow(), [step])
    assert gradient == pytest.approx(expected, abs=1e-8) and metrics.mean("loss") == pytest.approx(-score, abs=1e-7)


def test_an_estimate_is_drawn_for_each_sample_whatever_the_micro_batch() -> None:
    """The estimates of steps 0 to 3 differ; both samples together learn what they learn alone."""
    tail = PathwiseObjective(OneStepEstimate())
    together, _ = gradient_of(tail, gaussian_flow(), range(4), noises=(1, 2, 3, 4, 5, 6))
    alone = [gradient_of(tail, gaussian_flow(), range(4), noises=(seed,))[0] for seed in range(1, 7)]
    assert together == pytest.approx([sum(parts) / 6 for parts in zip(*alone, strict=True)], abs=1e-12)


@pytest.mark.parametrize(
    ("active", "rescale", "expected"),
    [
        ([0, 1, 2, 3], 0.0, (-1.1792803005, 0.689505955104)),
        ([1, 3], 0.0, (-0.58964015025, 0.269522850538)),
        ([1, 3], 0.5, (-0.884460225376, 0.404284275807)),
        ([3], 0.0, CHAIN[1]),
    ],
)
def test_sparse_steps_with_detached_inputs(
    active: list[int], rescale: float, expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseSteps, "_active_steps", lambda self, total, seed: active)
    objective = PathwiseObjective(SparseSteps(rescale=rescale))
    gradient, metrics = gradient_of(objective, gaussian_flow(), range(4))
    assert gradient == pytest.approx(expected, abs=1e-8)
    assert metrics.mean("loss") == pytest.approx(0.716067750847, abs=1e-7)  # the endpoint is the sample


def test_the_weights_of_sparse_steps_on_a_vp_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are q_i times the product of the later p; the constant that is added to the prediction shows them."""
    weights = (-61.6941306574, -1.34980971737, -0.61280078814)
    for step, weight in enumerate(weights):
        monkeypatch.setattr(SparseSteps, "_active_steps", lambda self, total, seed, step=step: [step])
        gradient, _ = gradient_of(PathwiseObjective(SparseSteps(rescale=0.0)), gaussian_vp(), range(3), DDIM(0.0))
        assert gradient[0] == pytest.approx(-2.96157831004 * weight / weights[-1], rel=1e-8)


@pytest.mark.parametrize("stop", range(4))
def test_sparse_steps_that_stop_early_end_in_an_estimate(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stop as the only active step this is the one-step estimate there, by value and by gradient."""
    monkeypatch.setattr("genalign.algorithms.tails.derived_seed", lambda *names: 3 - stop)
    objective = PathwiseObjective(SparseSteps(active=1, rescale=0.0, even=True, early_stop=1.0))
    gradient, metrics = gradient_of(objective, gaussian_flow(), range(4))
    score, expected = ESTIMATES.get(stop, (-0.716067750847, CHAIN[1]))
    assert gradient == pytest.approx(expected, abs=1e-8) and metrics.mean("loss") == pytest.approx(-score, abs=1e-7)


@pytest.mark.parametrize(
    ("late_bias", "expected"),
    [(1.0, (0.234523809524, 0.44126984127, 0.608333333333, 0.715873015873)), (0.0, (0.5,) * 4)],
)
def test_active_steps_are_drawn_without_replacement(late_bias: float, expected: tuple[float, ...]) -> None:
    """Fixture F26: how often each of four steps is one of two, within four standard errors of 4000 draws."""
    tail, draws = SparseSteps(active=2, late_bias=late_bias), 4000
    drawn = [tail._active_steps(4, seed) for seed in range(draws)]
    assert all(first < second for first, second in drawn)
    counts = Counter(step for steps in drawn for step in steps)
    assert [counts[step] / draws for step in range(4)] == pytest.approx(expected, abs=0.032)


def test_even_steps_are_equally_spaced_up_to_the_end() -> None:
    even = SparseSteps(active=3, even=True)
    assert [even._active_steps(total, 0) for total in (10, 8, 2)] == [[3, 6, 9], [2, 5, 7], [0, 1]]


@pytest.mark.parametrize(("copies", "expected"), [(1, None), (2, (-0.297450908176, 0.0645003546855))])
def test_noised_copies_share_the_weight(
    copies: int, expected: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair of a sample and a noise of -1 or 1: the expectation over both is exact."""
    noise = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64)
    monkeypatch.setattr("genalign.algorithms.tails.seeded_noise", lambda seeds, like: noise)
    gradient, _ = gradient_of(PathwiseObjective(RenoisedCopies(copies)), gaussian_flow(), [3], noises=(1, 2, 1, 2))
    expected = expected or tuple((a + b) / 2 for a, b in zip(CHAIN[1], COPY, strict=True))
    assert gradient == pytest.approx(expected, abs=1e-8)


def _edited_by_hand(first: int, graph: int, noise: Tensor) -> list[float]:
    """Noise the samples to the level ``first`` and move them back, with a gradient from the move ``graph`` on."""
    sigma, slopes = (1.0, 0.75, 0.5, 0.25, 0.0), (1.0, 0.979253112033, 0.439024390244, -0.544378698225)
    weights = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (BIAS, SLOPE)]
    final = 0.41035984975 + 0.606953247013 * torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    x = (1 - sigma[first]) * final + sigma[first] * noise
    for index in range(first, 4):
        exact = slopes[index] * (x - (1 - sigma[index]) * MEAN) - MEAN
        x = x + (sigma[index + 1] - sigma[index]) * (exact + weights[0] + weights[1] * x)
        x = x.detach() if index < graph else x
    return [float(part) for part in torch.autograd.grad(reward(x, []).mean(), weights)]


@pytest.mark.parametrize(("first", "last"), [(3, 1), (1, 1), (1, 2), (1, 3)])
def test_samples_that_are_noised_and_denoised(first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of a sample and a noise of -1 or 1; from the last level with one move it is a noised copy's."""
    noise = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64)
    monkeypatch.setattr("genalign.algorithms.tails.seeded_noise", lambda seeds, like: noise)
    tail = PartialChain(strength={1: 0.75, 3: 0.25}[first], last=last, moves=4)
    gradient, _ = gradient_of(PathwiseObjective(tail), gaussian_flow(), [], noises=(1, 2, 1, 2))
    assert gradient == pytest.approx(_edited_by_hand(first, 4 - last, noise), abs=1e-8)
    assert first < 3 or gradient == pytest.approx(COPY, abs=1e-8)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (DirectAlign(0.75, 0.9, 0.25), (-0.581282776552, 0.0893650133098)),
        (DirectAlign(0.5, 0.9, 0.25), (-0.388743155134, 0.0836394318494)),
        (DirectAlign(0.5, 0.6, 0.25, inversion=1.0), (-1.21843280579, -0.247044484259)),  # up, away from the reward
    ],
)
def test_direct_align(tail: DirectAlign, expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the lowest level of each, with every pair of a sample and a noise of -1 or 1."""
    noise = torch.tensor([[-1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64)
    monkeypatch.setattr("genalign.algorithms.tails.seeded_noise", lambda seeds, like: noise)
    monkeypatch.setattr("genalign.algorithms.tails.Mover.seeds", lambda self, seed, name: [0] * len(self.rows))
    gradient, _ = gradient_of(PathwiseObjective(tail), gaussian_flow(), [], noises=(1, 2, 1, 2))
    assert gradient == pytest.approx(expected, abs=1e-8)


def test_a_level_with_little_of_the_sample_is_refused() -> None:
    objective = PathwiseObjective(DirectAlign(0.9975, 0.9985, 0.001))
    with pytest.raises(ValueError, match=r"divides by alpha, which is 0\.00\d+ at .*: lower high, which is 0\.9985"):
        gradient_of(objective, gaussian_flow(), [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0.0}, r"ascent\.limit must be positive, not 0\.0; null sets no limit"),
        ({"batch_size": 0}, r"ascent\.batch_size must be at least 1 sample, not 0; null takes all"),
        ({"anchor": -0.1}, r"ascent\.anchor and ascent\.weight_distance must be at least 0, not -0\.1 and 0\.0"),
        ({"weight_distance": -1.0}, r"ascent\.anchor and ascent\.weight_distance must be .*, not 0\.0 and -1\.0"),
    ],
)
def test_an_ascent_that_would_not_ascend_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ascent(**arguments)


def test_the_anchor_and_the_distance_of_the_weights_are_subtracted() -> None:
    objective = PathwiseObjective(Chain(), Ascent(anchor=0.1, weight_distance=0.01))
    gradient, metrics = gradient_of(objective, gaussian_flow(), [3])
    assert gradient == pytest.approx((-0.313673661854, 0.0660934929237), abs=1e-8)
    value = -metrics.mean("loss") - 0.1 * metrics.mean("kl") - 0.01 * metrics.mean("drift")
    assert value == pytest.approx(-0.716972669191, abs=1e-7)
