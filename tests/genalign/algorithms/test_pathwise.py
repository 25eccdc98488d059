"""Gradients through the sampler, against their closed forms on a Gaussian chain (fixtures F1, F2 and F29)."""

from __future__ import annotations

import pytest
import torch

from genalign.algorithms.pathwise import Ascent, PathwiseObjective
from genalign.algorithms.tails import Chain, DirectAlign, OneStepEstimate, RenoisedCopies, SparseSteps
from genalign.diffusion.transitions import DDIM
from tests.genalign.algorithms.gaussian_chain import gaussian_flow, gaussian_vp, gradient_of

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


@pytest.mark.parametrize(
    ("step", "score", "expected"),
    [
        (0, -0.3625, (-1.2, 0.1)),
        (1, -0.387355228037, (-0.866833506224, 0.177618261314)),
        (2, -0.556498790072, (-0.57808767774, 0.156120267616)),
        (3, -0.716067750847, CHAIN[1]),
    ],
)
def test_one_step_estimates(step: int, score: float, expected: tuple[float, float]) -> None:
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


@pytest.mark.parametrize(("copies", "expected"), [(1, None), (2, (-0.297450908176, 0.0645003546855))])
def test_noised_copies_share_the_weight(
    copies: int, expected: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair of a sample and a noise of -1 or 1: the expectation over both is exact."""
    noise = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64)
    monkeypatch.setattr("genalign.algorithms.tails.seeded_noise", lambda seeds, like: noise)
    gradient, _ = gradient_of(PathwiseObjective(RenoisedCopies(copies)), gaussian_flow(), [3], noises=(1, 2, 1, 2))
    one = (-0.298766324702, 0.0629485657147)
    expected = expected or tuple((a + b) / 2 for a, b in zip(CHAIN[1], one, strict=True))
    assert gradient == pytest.approx(expected, abs=1e-8)


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


def test_the_anchor_and_the_leash_are_subtracted() -> None:
    gradient, metrics = gradient_of(PathwiseObjective(Chain(), Ascent(anchor=0.1, leash=0.01)), gaussian_flow(), [3])
    assert gradient == pytest.approx((-0.313673661854, 0.0660934929237), abs=1e-8)
    value = -metrics.mean("loss") - 0.1 * metrics.mean("kl") - 0.01 * metrics.mean("drift")
    assert value == pytest.approx(-0.716972669191, abs=1e-7)
